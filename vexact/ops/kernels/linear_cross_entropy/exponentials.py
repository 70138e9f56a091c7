"""Turns the exponentials that the product stored into gradients of the logits, in place.

With z = logit / T, m the maximum of z over the block of columns of an element, e = e^(z - m) and p = e e^(m - lse):
d logprob / d z_j = [j = target] - p_j. The block's factor e^(m - lse) is fp32, so beside the rounding of the gradient
there is that of e: a gradient is off by at most 2u of itself, u the unit roundoff of the dtype (2^-8 in bf16, 2^-11 in
fp16), where gradients of fp32 logits are off by u. In fp16 an e below 2^-14 has an absolute error of 2^-25 instead.
The target's 1 - p, which may cancel, does not see the rounding of e: its p is formed from the fp32 log-probability.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponentials_to_dlogits_kernel(
    values_ptr,  # (M, N): e on entry, the gradients on return
    top_ptr,  # (M, blocks) fp32, maxima m of z; -inf where a block keeps nothing
    target_ptr,  # (M,) int64
    inv_temperature_ptr,  # (M,) fp32, as the next three
    lse_ptr,
    logprob_ptr,
    dlogprob_ptr,
    N,
    stride,
    blocks,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program per row and BLOCKS blocks of WIDTH columns."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = values_ptr + row * stride + columns
    e = tl.load(at, mask=columns < N, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + row * blocks + block, mask=block < blocks, other=float("-inf"))
    slope = tl.load(dlogprob_ptr + row) * tl.load(inv_temperature_ptr + row)
    share = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.load(lse_ptr + row)))
    # The target is kept even where it lies below the threshold and its e is 0, so its share comes from its log-prob.
    chosen = tl.exp(tl.load(logprob_ptr + row))
    is_target = columns == tl.load(target_ptr + row)
    grad = tl.where(is_target, slope * (1.0 - chosen), e * (-slope * share)[:, None])
    tl.store(at, grad.to(values_ptr.dtype.element_ty), mask=columns < N)
