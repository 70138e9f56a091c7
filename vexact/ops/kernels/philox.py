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
    m0 = tl.full((), _MULTIPLIER_0, tl.uint32)
    m1 = tl.full((), _MULTIPLIER_1, tl.uint32)
    w0 = tl.full((), _WEYL_0, tl.uint32)
    w1 = tl.full((), _WEYL_1, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3
