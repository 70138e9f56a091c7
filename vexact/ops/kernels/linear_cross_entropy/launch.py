"""Launches the kernels of the fused cross-entropy on one chunk of tokens or one slice of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.ops.kernels.linear.launch import (
    capability,
    matmul,
    multiprocessors,
    operand_descriptor,
    strip_descriptor,
    use_descriptors,
)
from vexact.ops.kernels.linear_cross_entropy.chunks import padded
from vexact.ops.kernels.linear_cross_entropy.dlogits import dlogits_kernel, matmul_dlogits_kernel
from vexact.ops.kernels.linear_cross_entropy.exponentials import exponentials_to_dlogits_kernel
from vexact.ops.kernels.linear_cross_entropy.states import matmul_states_kernel
from vexact.ops.kernels.logprob import BLOCK, QUARTER_LEVELS, empty_states, merge_states
from vexact.ops.kernels.sizes import cdiv

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


def fuses_epilogue(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the product can turn its logits into states, or into gradients, before it stores anything."""
    k_major = hidden.stride(1) == 1 and weight.stride(1) == 1
    # On sm_100 the whole fp32 tile would pass through shared memory, which the stages leave no room for.
    hopper = capability(hidden.device)[0] == 9
    return hopper and k_major and hidden.dtype != torch.float32 and use_descriptors(hidden, weight)


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    exponentials: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Log-prob, log-sum-exp and entropy, each (T,) fp32, without stored logits, and the maxima (T, blocks) fp32 of z.

    z = logit * inv_temperature. ``exponentials`` (T, V), in the dtype of ``hidden``, receives e^(z - m) with m the
    maximum of the block that the column lies in, and 0 where the logit is below ``min_logit``.
    """
    (tokens, size), vocabulary = hidden.shape, weight.shape[0]
    states = empty_states(tokens, vocabulary, hidden.device)
    chosen = torch.full((tokens,), float("nan"), dtype=torch.float32, device=hidden.device)
    block_m, block_k, group_m, stages = STATES_TILE
    tiles = cdiv(tokens, block_m) * cdiv(vocabulary, 4 * BLOCK)
    hidden_desc = operand_descriptor(hidden, block_m, block_k)[0]
    stored = hidden_desc if exponentials is None else strip_descriptor(exponentials, block_m, BLOCK)
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
        STORE_EXPONENTIALS=exponentials is not None,
        num_warps=8,
        num_stages=stages,
        enable_fp_fusion=False,
    )
    return merge_states(states, chosen, targets, inv_temperature, min_logit, vocabulary, gather=False), states[0]


def recomputed_dlogits(hidden: Tensor, weight: Tensor, rows: RowStatistics, first_column: int, out: Tensor) -> Tensor:
    """Gradients (T, N) of the logits of the vocabulary slice ``weight`` (N, H), written into ``out``."""
    (tokens, size), count = hidden.shape, weight.shape[0]
    if not fuses_epilogue(hidden, weight):
        logits = torch.empty(tokens, padded(count), dtype=torch.float32, device=hidden.device)[:, :count]
        return stored_dlogits(matmul(hidden, weight, logits, layout="forward"), rows, first_column, out)
    block_m, block_n, block_k, group_m = DLOGITS_TILE
    tiles = cdiv(tokens, block_m) * cdiv(count, block_n)
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


def stored_dlogits(logits: Tensor, rows: RowStatistics, first_column: int, out: Tensor) -> Tensor:
    """Gradients of fp32 ``logits`` (T, N), written into ``out``."""
    tokens, count = logits.shape
    dlogits_kernel[(tokens, cdiv(count, DLOGITS_BLOCK))](
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


def exponentials_to_dlogits(values: Tensor, tops: Tensor, token_logprobs: Tensor, rows: RowStatistics) -> None:
    """Overwrite the exponentials that ``logprobs`` stored, ``values`` (T, V), with the gradients of the logits.

    ``tops`` (T, blocks) and ``token_logprobs`` (T,), both fp32, are what it returned. ``rows.dentropy`` is not used.
    """
    tokens, vocabulary = values.shape
    blocks = tops.shape[1]
    exponentials_to_dlogits_kernel[(tokens, cdiv(blocks, DLOGITS_BLOCK // BLOCK))](
        values,
        tops,
        rows.targets.contiguous(),
        rows.inv_temperature.contiguous(),
        rows.lse,
        token_logprobs,
        rows.dlogprobs.contiguous(),
        vocabulary,
        values.stride(0),
        blocks,
        WIDTH=BLOCK,
        BLOCKS=DLOGITS_BLOCK // BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
