"""Logarithm and exponential from single additions, products and fused multiply-adds, which a CPU can repeat bit by bit.

Kernels that use them are launched with ``enable_fp_fusion=False``; ``ops/cpu/sampling/portable_math.py`` is the twin.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_of_normal(x):
    """Natural logarithm of positive normal fp32 numbers, relative error below 1.2e-7."""
    bits = x.to(tl.int32, bitcast=True)
    # x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
    shifted = bits - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = (bits - (shifted & -8388608)).to(tl.float32, bitcast=True) - 1.0
    p = tl.full(f.shape, 0.08746833354234695, tl.float32)
    p = tl.fma(p, f, -0.14325468242168427)
    p = tl.fma(p, f, 0.14921709895133972)
    p = tl.fma(p, f, -0.16568464040756226)
    p = tl.fma(p, f, 0.19961564242839813)
    p = tl.fma(p, f, -0.2500181794166565)
    p = tl.fma(p, f, 0.3333396315574646)
    p = tl.fma(p, f, -0.49999991059303284)
    return tl.fma(exponent, 0.6931471824645996, tl.fma(f * f, p, f))


@triton.jit
def exp_of_negative(z):
    """e^z for z <= 0, relative error below 1.9e-7 and that of z * log2(e)."""
    t = tl.maximum(z * 1.4426950216293335, -126.0)
    whole = tl.floor(t + 0.5)
    f = t - whole
    p = 0.001326472731307149 * f + 0.009671512991189957
    p = p * f + 0.05550733581185341
    p = p * f + 0.24022242426872253
    p = p * f + 0.6931470036506653
    p = p * f + 1.0
    return p * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
