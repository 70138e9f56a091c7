"""Log-probabilities from logits: the one definition that the sampler and the fused linear cross-entropy share.

A row is walked in vocabulary order, LANES columns at a time; every lane keeps its own running maximum, sum and first
moment, and the lanes are merged at the end by a tree of explicit pairs. Neither depends on the thread layout, so a row
has the same bits in a decode batch of one and in a training chunk, whatever its stride or alignment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 4096
WARPS = 8


@triton.jit
def pairwise_sum(x, LEVELS: tl.constexpr):
    """Sum of the 2**LEVELS elements of ``x``: left half plus right half, again and again.

    Every reduction has two terms, so neither the thread layout nor the compiler has an order to choose.
    """
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.max(x, 0)


@triton.jit
def token_logprobs_kernel(
    logits_ptr,  # (B, V) fp32
    token_ptr,  # (B,) int64
    inv_temperature_ptr,  # (B,) fp32
    min_logit_ptr,  # (B,) fp32
    logprob_ptr,  # (B,) fp32
    lse_ptr,  # (B,) fp32
    entropy_ptr,  # (B,) fp32
    V,
    stride,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program per row. With s = sum of e^(z - m) and t = sum of e^(z - m) (z - m) over the kept set,

    lse = m + log s and entropy = log s - t / s.
    """
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    min_logit = tl.load(min_logit_ptr + row)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, LANES)
    top = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    for start in tl.range(0, V, LANES, num_stages=3):
        columns = start + lanes
        logit = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf"))
        dropped = (logit < min_logit) | (columns >= V)
        z = tl.where(dropped, float("-inf"), logit * inv_temperature)
        new_top = tl.maximum(top, z)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing kept so far: avoid inf - inf
        decay = tl.exp(top - base)
        p = tl.exp(z - base)
        moved = tl.where(top == float("-inf"), 0.0, top - base)
        moment = decay * (moment + total * moved) + tl.where(z == float("-inf"), 0.0, p * (z - base))
        total = decay * total + p
        top = new_top
    row_top = tl.max(top, 0)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    decay = tl.exp(top - base)
    moved = tl.where(top == float("-inf"), 0.0, top - base)
    row_moment = pairwise_sum(decay * (moment + total * moved), LEVELS)
    row_total = pairwise_sum(decay * total, LEVELS)

    token = tl.load(token_ptr + row)
    # A token outside the vocabulary has no log-probability: NaN shows up in every audit, a clamped index would not.
    chosen = tl.load(row_ptr + token, mask=(token >= 0) & (token < V), other=float("nan")) * inv_temperature
    lse = base + tl.log(row_total)
    tl.store(lse_ptr + row, lse)
    tl.store(logprob_ptr + row, chosen - lse)
    tl.store(entropy_ptr + row, tl.log(row_total) - row_moment / row_total)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, V) fp32, the rest (B,) -> log-prob of the token, log-sum-exp and entropy of the kept set, (B,) fp32.

    z = logit * inv_temperature and the kept set is {logit >= min_logit}; nats.
    """
    rows, vocabulary = logits.shape
    logprobs, lse, entropy = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        # Without fusion each product is rounded where it is written, in every binary of this kernel.
        token_logprobs_kernel[(rows,)](
            logits,
            token_ids,
            inv_temperature,
            min_logit,
            logprobs,
            lse,
            entropy,
            vocabulary,
            logits.stride(0),
            LANES=LANES,
            LEVELS=LANES.bit_length() - 1,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return logprobs, lse, entropy
