"""Fused multiply-add of fp32 tensors with the bits of a processor's own instruction."""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of fp32 tensors that broadcast together, rounded once.

    The product is exact in fp64. The sum is rounded to odd there (Boldo & Melquiond 2008, "Emulation of FMA and
    correctly rounded sums"): where bits were lost, which the error of the sum tells, the last bit is made 1, so that
    the rounding to fp32 sees no tie that was none.
    """
    product, wide = a.double() * b.double(), c.double()
    total = product + wide
    back = total - product
    error = (product - (total - back)) + (wide - back)
    bits = total.view(torch.int64)
    lost = ((error > 0) | (error < 0)) & (bits & 1 == 0)  # no error of infinities and NaN is either
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(lost, bits + towards, bits).view(torch.float64).float()
