"""Fused linear cross-entropy, forward and backward at once: three products instead of four.

A chunk of tokens becomes gradients of its logits while these are at hand: the epilogue of the product stores rounded
exponentials where the gradients will be, and an elementwise kernel finishes them in place; without that epilogue the
fp32 logits of the chunk are stored. dweight must be accumulated in fp32, so the gradients of a group of chunks are
collected first and the large buffer is touched once per group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vexact.ops.kernels.linear.launch import matmul
from vexact.ops.kernels.linear_cross_entropy import launch
from vexact.ops.kernels.linear_cross_entropy.chunks import ROW_MULTIPLE, balanced_size, cut, padded
from vexact.ops.kernels.logprob import BLOCK, token_logprobs
from vexact.ops.kernels.sizes import cdiv

# Allocated beside what is returned and fp32 dweight: the gradients of a group of tokens, and for a chunk of them the
# log-prob states (one part in STATES_PART of the bytes) or also fp32 logits (one in LOGITS_PART). At a vocabulary of
# 151,936 in bf16 a group has 4096 tokens in chunks of 2048, or 2048 in chunks of 1024.
WORKSPACE_BYTES = 1260 << 20
STATES_PART = 21
LOGITS_PART = 2


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
    logprobs, entropies = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
    dhidden = torch.empty_like(hidden)
    if not tokens:
        return logprobs, entropies, dhidden, torch.zeros_like(weight)
    group_size, chunk_size = group_and_chunk(hidden, weight)
    gradients = torch.empty(group_size, padded(vocabulary), dtype=hidden.dtype, device=hidden.device)[:, :vocabulary]
    # A single group writes dweight at once; the sum over several needs fp32.
    dtype = weight.dtype if tokens <= group_size else torch.float32
    dweight = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for group in cut(tokens, group_size):
        dlogits = gradients[: group.stop - group.start]
        for chunk in cut(group.stop - group.start, chunk_size):
            at = slice(group.start + chunk.start, group.start + chunk.stop)
            rows = (targets[at], inv_temperature[at], min_logit[at])
            logprobs[at], entropies[at] = chunk_gradients(hidden[at], weight, *rows, dloss, at, dlogits[chunk])
        matmul(dlogits, weight.t(), dhidden[group], layout="grad_input")
        matmul(dlogits.t(), hidden[group].t(), dweight, layout="grad_weight", accumulate=group.start > 0)
    del dlogits, gradients  # before dweight is copied
    return logprobs, entropies, dhidden, dweight.to(weight.dtype)


def group_and_chunk(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Tokens whose gradients are held at once, and tokens whose product is formed at once."""
    tokens, width = hidden.shape[0], padded(weight.shape[0])
    chunk_bytes, part = 12 * cdiv(width, BLOCK), STATES_PART
    if not launch.fuses_epilogue(hidden, weight):
        chunk_bytes, part = chunk_bytes + 4 * width, LOGITS_PART
    workspace = WORKSPACE_BYTES // part
    limit = (WORKSPACE_BYTES - workspace) // (hidden.element_size() * width)
    group = min(balanced_size(tokens, limit, ROW_MULTIPLE), tokens)
    return group, min(balanced_size(group, workspace // chunk_bytes, ROW_MULTIPLE), group)


def chunk_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    dloss: Callable[[Tensor, slice], Tensor],
    at: slice,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the gradients (T, V) of a chunk's logits into ``out``; returns log-probs and entropies, (T,) fp32.

    ``at`` is where the chunk lies among all tokens, for ``dloss``.
    """
    rows = (targets, inv_temperature, min_logit)
    if launch.fuses_epilogue(hidden, weight):
        (logprobs, lse, entropy), tops = launch.logprobs(hidden, weight, *rows, exponentials=out)
        statistics = launch.RowStatistics(*rows, lse, entropy, dloss(logprobs, at), None)
        launch.exponentials_to_dlogits(out, tops, logprobs, statistics)
    else:
        logits = torch.empty(hidden.shape[0], padded(weight.shape[0]), dtype=torch.float32, device=hidden.device)
        logits = matmul(hidden, weight, logits[:, : weight.shape[0]], layout="forward")
        logprobs, lse, entropy = token_logprobs(logits, *rows)
        statistics = launch.RowStatistics(*rows, lse, entropy, dloss(logprobs, at), None)
        launch.stored_dlogits(logits, statistics, 0, out)
    return logprobs, entropy
