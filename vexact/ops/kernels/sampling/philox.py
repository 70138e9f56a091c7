"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") as a Triton function."""

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_WEYL_0 = tl.constexpr(0x9E3779B9)
_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox_4x32_10(c0, c1, c2, c3, k0, k1):
    """Four uint32 words from the counter (c0, c1, c2, c3) and the key (k0, k1), all uint32 and broadcastable."""
    m0 = tl.full((), _MULTIPLIER_0, tl.uint64)
    m1 = tl.full((), _MULTIPLIER_1, tl.uint64)
    w0 = tl.full((), _WEYL_0, tl.uint32)
    w1 = tl.full((), _WEYL_1, tl.uint32)
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves of the product.
        product0 = c0.to(tl.uint64) * m0
        product1 = c2.to(tl.uint64) * m1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3
