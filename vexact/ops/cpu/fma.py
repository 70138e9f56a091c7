"""Fused multiply-add of fp32 tensors with the bits of a processor's own instruction."""

from __future__ import annotations

import torch
from torch import Tensor

_TIE, _BELOW_FP32 = 1 << 28, (1 << 29) - 1  # the bits of an fp64 number that fp32 has no room for, and half of them
_SMALLEST_NORMAL = 2.0**-126


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 tensors that broadcast together, rounded once.

    The product is exact in fp64, so that the sum there is rounded once, too, and a second time to fp32. The second
    rounding goes wrong only where the first one has made a tie of fp32; those sums are repeated with care.
    """
    a, b, c = a.double(), b.double(), c.double()
    total = torch.addcmul(c, a, b)
    doubtful = (total.view(torch.int64) & _BELOW_FP32 == _TIE) | (total.abs() < _SMALLEST_NORMAL)
    if doubtful.any():
        exact = [x.expand(total.shape)[doubtful] for x in (a, b, c)]
        total[doubtful] = _rounded_to_odd(exact[0] * exact[1], exact[2])
    return total.float()


def _rounded_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b in fp64, where a sum that loses bits gets an odd last one, which no further rounding takes for a tie.

    Boldo & Melquiond 2008, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd";
    the error of a sum is Knuth's.
    """
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    bits = total.view(torch.int64)
    lost = ((error > 0) | (error < 0)) & (bits & 1 == 0)  # infinities and NaN have an error that is neither
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(lost, bits + towards, bits).view(torch.float64)
