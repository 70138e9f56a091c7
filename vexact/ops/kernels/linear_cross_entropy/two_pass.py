"""Fused linear cross-entropy: log-prob and entropy of every token from hidden states, without a T x V matrix.

The forward forms the log-prob states of ``logprob`` in the epilogue of the product, so no logits are stored; where the
epilogue cannot (fp32, other GPUs, odd strides) it walks the tokens in chunks of stored logits, to the same bits. The
backward walks the vocabulary in slices instead: a slice's logits are recomputed and turned into gradients in the
epilogue of the product, its part of dweight is complete at once, and only the small dhidden is accumulated (fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.kernels.linear.launch import matmul
from vexact.ops.kernels.linear_cross_entropy import launch
from vexact.ops.kernels.linear_cross_entropy.chunks import ROW_MULTIPLE, balanced_size, cut, padded
from vexact.ops.kernels.logprob import BLOCK, token_logprobs
from vexact.ops.kernels.sizes import cdiv

WORKSPACE_BYTES = 1280 << 20  # a chunk of stored logits, or the gradients of a slice of the vocabulary
BACKWARD_BYTES = 2480 << 20  # that slice together with the gradients that are returned, as far as these leave room
COLUMN_MULTIPLE = 256


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, H), weight (V, H), the rest (T,) -> log-prob of the target, log-sum-exp, entropy: (T,) fp32."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    fused = launch.fuses_epilogue(hidden, weight)
    width = padded(vocabulary)
    bytes_per_token = 12 * cdiv(width, BLOCK) if fused else 4 * width
    size = max(min(balanced_size(tokens, WORKSPACE_BYTES // bytes_per_token, ROW_MULTIPLE), tokens), 1)
    logits = None if fused else torch.empty(size, width, dtype=torch.float32, device=hidden.device)[:, :vocabulary]
    results = [torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(3)]
    for chunk in cut(tokens, size):
        rows = (targets[chunk], inv_temperature[chunk], min_logit[chunk])
        if logits is None:
            values = launch.logprobs(hidden[chunk], weight, *rows)[0]
        else:
            matmul(hidden[chunk], weight, logits[: chunk.stop - chunk.start], layout="forward")
            values = token_logprobs(logits[: chunk.stop - chunk.start], *rows)
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
    rows = launch.RowStatistics(targets, inv_temperature, min_logit, lse, entropy, dlogprobs, dentropy)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if not tokens:
        return torch.empty_like(hidden), dweight.zero_()
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    # fp32 logits are stored beside their gradients when the epilogue cannot make them.
    bytes_per_column = tokens * (hidden.element_size() + (0 if launch.fuses_epilogue(hidden, weight) else 4))
    room = BACKWARD_BYTES - dweight.nbytes - dhidden.nbytes - hidden.nbytes
    room = min(WORKSPACE_BYTES, max(room, BACKWARD_BYTES // 8))
    size = min(balanced_size(vocabulary, room // bytes_per_column, COLUMN_MULTIPLE), padded(vocabulary))
    workspace = torch.empty(tokens, size, dtype=hidden.dtype, device=hidden.device)
    for columns in cut(vocabulary, size):
        count = columns.stop - columns.start
        dlogits = launch.recomputed_dlogits(hidden, weight[columns], rows, columns.start, workspace[:, :count])
        matmul(dlogits.t(), hidden.t(), dweight[columns], layout="grad_weight")
        matmul(dlogits, weight[columns].t(), dhidden, layout="grad_input", accumulate=True)
    return dhidden.to(hidden.dtype), dweight
