"""Logarithm and exponential with the bits of the Triton kernels (``ops/kernels/sampling/portable_math.py``)."""

from __future__ import annotations

import numpy as np

_SQRT_HALF_BITS, _EXPONENT_BITS = np.int32(0x3F3504F3), np.int32(-8388608)
_LOG_2, _LOG2_E = np.float32(0.6931471824645996), np.float32(1.4426950216293335)
_LOG = (
    0.08746833354234695,
    -0.14325468242168427,
    0.14921709895133972,
    -0.16568464040756226,
    0.19961564242839813,
    -0.2500181794166565,
    0.3333396315574646,
    -0.49999991059303284,
)
_EXP2 = (
    0.001326472731307149,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
    1.0,
)
_EXP2_LOWEST = np.float32(-126.0)  # of the smallest normal number


def log_of_normal(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal fp32 numbers."""
    bits = x.view(np.int32)
    # x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
    shifted = bits - _SQRT_HALF_BITS
    exponent = (shifted >> 23).astype(np.float32)
    f = (bits - (shifted & _EXPONENT_BITS)).view(np.float32) - np.float32(1.0)
    p = np.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        p = _fma(p, f, np.float32(coefficient))
    return _fma(exponent, _LOG_2, _fma(f * f, p, f))


def exp_of_negative(z: np.ndarray) -> np.ndarray:
    """e^z for fp32 z <= 0."""
    t = np.maximum(z * _LOG2_E, _EXP2_LOWEST)
    whole = np.floor(t + np.float32(0.5))
    f = t - whole
    p = np.full_like(f, _EXP2[0])
    for coefficient in _EXP2[1:]:
        p = p * f + np.float32(coefficient)
    return p * ((whole.astype(np.int32) + 127) << 23).view(np.float32)


def _fma(a: np.ndarray, b: np.ndarray | np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """a * b + c rounded once, but for sums that lie on a tie of fp32 after their rounding to fp64.

    The product of two fp32 numbers is exact in fp64. The sampler's noise has none of those sums (a test goes through
    all its 2^23 values).
    """
    return (a.astype(np.float64) * b + c).astype(np.float32)
