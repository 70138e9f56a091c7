"""Which positions have the same argmax, and which have another one that the reference cannot tell apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EXPONENT = 0x7F800000  # the exponent bits of a float32


class ArgmaxAgreement(NamedTuple):
    """Three (R,) masks of which at most one is true at a position; where none is, the two models disagree."""

    equal: Tensor
    tied: Tensor
    adjacent: Tensor


def argmax_agreement(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> ArgmaxAgreement:
    """Both (R, V) fp32. Let a be the argmax of ``ours`` and b that of ``reference``.

    Equal: a is b. Tied: a is not b, but ``reference`` gives both the same logit. Adjacent: the two logits that
    ``reference`` gives differ, by at most one unit in the last place of ``dtype``, taken at the smaller of the two.
    Only the reference's gap between a and b counts; the logits of ``ours`` decide nothing but a.

    ``dtype`` is the one that ``ours`` computes in, also when ``reference`` is float32. Logits follow from hidden states
    that are rounded to it, which leaves them an error of about its unit: the order of two logits that are closer says
    nothing. For a reference that ran in ``dtype`` itself, and so rounds its logits to it, adjacent means exactly:
    neighbouring values, with none between. For one in float32 the gap is measured unrounded; rounding it first would
    let almost two units pass.
    """
    a, b = ours.argmax(-1, keepdim=True), reference.argmax(-1, keepdim=True)  # (R, 1)
    at_a, at_b = reference.gather(1, a), reference.gather(1, b)
    equal = a == b
    tied = ~equal & (at_a == at_b)
    smaller = torch.minimum(at_a.abs(), at_b.abs())
    adjacent = ~equal & ~tied & (at_b - at_a <= unit_in_last_place(smaller, dtype))
    return ArgmaxAgreement(equal.flatten(), tied.flatten(), adjacent.flatten())


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance from |value| rounded towards zero to the next larger value of ``dtype``; ``values`` are fp32."""
    info = torch.finfo(dtype)
    power = (values.contiguous().view(torch.int32) & _EXPONENT).view(torch.float32)  # 2 ** floor(log2 |value|)
    return power.clamp(min=info.smallest_normal) * info.eps
