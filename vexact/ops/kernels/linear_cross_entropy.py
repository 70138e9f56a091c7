"""Fused linear cross-entropy: log-prob and entropy of every token from hidden states, without a T x V matrix.

The forward forms the log-prob states of ``logprob`` in the epilogue of the product, so no logits are stored; where the
epilogue cannot (fp32, other GPUs, odd strides) it walks the tokens in chunks of stored logits, to the same bits. The
backward walks the vocabulary in slices instead: a slice's logits are recomputed and turned into gradients in the
epilogue of the product, its part of dweight is complete at once, and only the small dhidden is accumulated (fp32). The
one-pass form has the logits of a token chunk at hand, but must accumulate dweight; it collects the gradients of several
chunks first, so that the large fp32 buffer is touched a few times only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vexact.ops.kernels.linear import (
    capability,
    matmul,
    multiprocessors,
    operand_descriptor,
    strip_descriptor,
    use_descriptors,
)
from vexact.ops.kernels.linear_cross_entropy_forward import matmul_states_kernel
from vexact.ops.kernels.linear_cross_entropy_grad import dlogits_kernel, matmul_dlogits_kernel
from vexact.ops.kernels.logprob import BLOCK, QUARTER_LEVELS, empty_states, merge_states, token_logprobs

WORKSPACE_BYTES = 1280 << 20  # a chunk of stored logits, or the gradients of a slice of the vocabulary
BACKWARD_BYTES = 2480 << 20  # that slice together with the gradients that are returned, as far as these leave room
# The one-pass form holds fp32 dweight too. At V = 151,936 these are 1024 and 2048 tokens, and 2048 tokens are one full
# wave of tiles in the product that makes dhidden.
ONE_PASS_LOGITS_BYTES = 600 << 20
ONE_PASS_GRADIENT_BYTES = 600 << 20
ROW_MULTIPLE = 128
COLUMN_MULTIPLE = 256
DLOGITS_TILE = (128, 256, 64, 8)  # rows, columns, depth, column-group height
STATES_TILE = (128, 64, 16, 4)  # rows, depth, column-group height, stages
DLOGITS_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """What the gradient of a row needs beside its logits; all (T,), fp32 but for ``targets``."""

    targets: Tensor
    inv_temperature: Tensor
    min_logit: Tensor
    lse: Tensor
    entropy: Tensor
    dlogprobs: Tensor
    dentropy: Tensor | None

    def pointers(self) -> tuple[Tensor, ...]:
        """The arguments of the gradient kernels, in their order. Autograd hands over expanded gradients: dense here."""
        dentropy = self.dlogprobs if self.dentropy is None else self.dentropy
        vectors = (self.targets, self.inv_temperature, self.min_logit, self.lse, self.entropy, self.dlogprobs, dentropy)
        return tuple(vector.contiguous() for vector in vectors)


def balanced_size(total: int, limit: int, multiple: int) -> int:
    """The length, a multiple of ``multiple`` and at most ``limit`` where that allows, that cuts ``total`` evenly."""
    limit = max(limit // multiple, 1) * multiple
    pieces = max(triton.cdiv(total, limit), 1)
    return max(triton.cdiv(triton.cdiv(total, pieces), multiple), 1) * multiple


def cut(total: int, size: int) -> Iterator[slice]:
    """Slices of ``size``, the last one shorter, that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def padded(columns: int) -> int:
    """``columns`` rounded up so that every row of a workspace starts at an address descriptors accept."""
    return triton.cdiv(columns, 16) * 16


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, H), weight (V, H), the rest (T,) -> log-prob of the target, log-sum-exp, entropy: (T,) fp32."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    fused = _fuses_epilogue(hidden, weight)
    width = padded(vocabulary)
    bytes_per_token = 12 * triton.cdiv(width, BLOCK) if fused else 4 * width
    size = max(min(balanced_size(tokens, WORKSPACE_BYTES // bytes_per_token, ROW_MULTIPLE), tokens), 1)
    logits = None if fused else torch.empty(size, width, dtype=torch.float32, device=hidden.device)[:, :vocabulary]
    results = [torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(3)]
    for chunk in cut(tokens, size):
        rows = chunk.stop - chunk.start
        stored = None if logits is None else logits[:rows]
        values = _logits_and_logprobs(
            hidden[chunk], weight, targets[chunk], inv_temperature[chunk], min_logit[chunk], stored
        )
        for result, value in zip(results, values, strict=True):
            result[chunk] = value
    return results[0], results[1], results[2]


def backward(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    lse: Tensor,
    entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the forward: dhidden (T, H) and dweight (V, H), in the dtypes of what they belong to."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows = RowStatistics(targets, inv_temperature, min_logit, lse, entropy, dlogprobs, dentropy)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if not tokens:
        return torch.empty_like(hidden), dweight.zero_()
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    # fp32 logits are stored beside their gradients when the epilogue cannot make them.
    bytes_per_column = tokens * (hidden.element_size() + (0 if _fuses_epilogue(hidden, weight) else 4))
    room = BACKWARD_BYTES - dweight.nbytes - dhidden.nbytes - hidden.nbytes
    room = min(WORKSPACE_BYTES, max(room, BACKWARD_BYTES // 8))
    size = min(balanced_size(vocabulary, room // bytes_per_column, COLUMN_MULTIPLE), padded(vocabulary))
    workspace = torch.empty(tokens, size, dtype=hidden.dtype, device=hidden.device)
    for columns in cut(vocabulary, size):
        count = columns.stop - columns.start
        dlogits = _recomputed_dlogits(hidden, weight[columns], rows, columns.start, workspace[:, :count])
        matmul(dlogits.t(), hidden.t(), dweight[columns], layout="grad_weight")
        matmul(dlogits, weight[columns].t(), dhidden, layout="grad_input", accumulate=True)
    return dhidden.to(hidden.dtype), dweight


def one_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    dloss: Callable[[Tensor, slice], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward at once, for a loss that is a sum over tokens of a function of the token's log-prob.

    ``dloss(logprobs of a chunk, its slice of the tokens)`` returns the loss's derivative by each log-prob, (chunk,)
    fp32. Returns log-probs (T,) fp32, entropies (T,) fp32, dhidden (T, H) and dweight (V, H).
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    width = padded(vocabulary)
    logprobs, entropies = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    dhidden = torch.empty_like(hidden)
    if not tokens:
        return logprobs, entropies, dhidden, torch.zeros_like(weight)
    group_size = balanced_size(tokens, ONE_PASS_GRADIENT_BYTES // (hidden.element_size() * width), ROW_MULTIPLE)
    group_size = min(group_size, tokens)
    chunk_size = min(balanced_size(group_size, ONE_PASS_LOGITS_BYTES // (4 * width), ROW_MULTIPLE), group_size)
    gradients = torch.empty(group_size, width, dtype=hidden.dtype, device=hidden.device)
    workspace = torch.empty(chunk_size, width, dtype=torch.float32, device=hidden.device)
    # A single group writes dweight at once; the sum over several needs fp32.
    dtype = weight.dtype if tokens <= group_size else torch.float32
    dweight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for group in cut(tokens, group_size):
        for chunk in cut(group.stop - group.start, chunk_size):
            at = slice(group.start + chunk.start, group.start + chunk.stop)
            logits = workspace[: at.stop - at.start, :vocabulary]
            rows = (targets[at], inv_temperature[at], min_logit[at])
            logprobs[at], lse, entropies[at] = _logits_and_logprobs(hidden[at], weight, *rows, logits)
            statistics = RowStatistics(*rows, lse, entropies[at], dloss(logprobs[at], at), None)
            _stored_dlogits(logits, statistics, 0, gradients[chunk, :vocabulary])
        dlogits = gradients[: group.stop - group.start, :vocabulary]
        matmul(dlogits, weight.t(), dhidden[group], layout="grad_input")
        matmul(dlogits.t(), hidden[group].t(), dweight, layout="grad_weight", accumulate=group.start > 0)
    del dlogits, logits, gradients, workspace  # before dweight is copied
    return logprobs, entropies, dhidden, dweight.to(weight.dtype)


def _fuses_epilogue(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the product can turn its logits into states, or into gradients, before it stores anything."""
    k_major = hidden.stride(1) == 1 and weight.stride(1) == 1
    # On sm_100 the whole fp32 tile would pass through shared memory, which the stages leave no room for.
    hopper = capability(hidden.device)[0] == 9
    return hopper and k_major and hidden.dtype != torch.float32 and use_descriptors(hidden, weight)


def _logits_and_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, log-sum-exp and entropy of a chunk; its logits go to ``logits`` (T, V) fp32 where that is given."""
    (tokens, size), vocabulary = hidden.shape, weight.shape[0]
    if not _fuses_epilogue(hidden, weight):
        assert logits is not None, "a product without the fused epilogue stores its logits"
        matmul(hidden, weight, logits, layout="forward")
        return token_logprobs(logits, targets, inv_temperature, min_logit)
    states = empty_states(tokens, vocabulary, hidden.device)
    chosen = torch.full((tokens,), float("nan"), dtype=torch.float32, device=hidden.device)
    block_m, block_k, group_m, stages = STATES_TILE
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(vocabulary, 4 * BLOCK)
    hidden_desc = operand_descriptor(hidden, block_m, block_k)[0]
    stored = hidden_desc if logits is None else strip_descriptor(logits, block_m, BLOCK)
    matmul_states_kernel[(min(tiles, multiprocessors(hidden.device)),)](
        hidden_desc,
        operand_descriptor(weight, 4 * BLOCK, block_k)[0],
        stored,
        *states,
        chosen,
        targets.contiguous(),
        inv_temperature.contiguous(),
        min_logit.contiguous(),
        tokens,
        vocabulary,
        size,
        states.shape[2],
        BLOCK_M=block_m,
        WIDTH=BLOCK,
        QUARTER_LEVELS=QUARTER_LEVELS,
        BLOCK_K=block_k,
        GROUP_M=group_m,
        STORE_LOGITS=logits is not None,
        num_warps=8,
        num_stages=stages,
        enable_fp_fusion=False,
    )
    return merge_states(states, chosen, targets, inv_temperature, vocabulary, gather=False)


def _recomputed_dlogits(hidden: Tensor, weight: Tensor, rows: RowStatistics, first_column: int, out: Tensor) -> Tensor:
    """Gradients (T, N) of the logits of the vocabulary slice ``weight`` (N, H), written into ``out``."""
    (tokens, size), count = hidden.shape, weight.shape[0]
    if not _fuses_epilogue(hidden, weight):
        logits = torch.empty(tokens, padded(count), dtype=torch.float32, device=hidden.device)[:, :count]
        return _stored_dlogits(matmul(hidden, weight, logits, layout="forward"), rows, first_column, out)
    block_m, block_n, block_k, group_m = DLOGITS_TILE
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(count, block_n)
    matmul_dlogits_kernel[(min(tiles, multiprocessors(hidden.device)),)](
        operand_descriptor(hidden, block_m, block_k)[0],
        operand_descriptor(weight, block_n, block_k)[0],
        strip_descriptor(out, block_m, block_n // 4),
        *rows.pointers(),
        tokens,
        count,
        size,
        first_column,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=group_m,
        HAS_DENTROPY=rows.dentropy is not None,
        num_warps=8,
        num_stages=4,
        enable_fp_fusion=False,
    )
    return out


def _stored_dlogits(logits: Tensor, rows: RowStatistics, first_column: int, out: Tensor) -> Tensor:
    """Gradients of fp32 ``logits`` (T, N), written into ``out``."""
    tokens, count = logits.shape
    dlogits_kernel[(tokens, triton.cdiv(count, DLOGITS_BLOCK))](
        logits,
        out,
        *rows.pointers(),
        count,
        logits.stride(0),
        out.stride(0),
        first_column,
        BLOCK=DLOGITS_BLOCK,
        HAS_DENTROPY=rows.dentropy is not None,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
