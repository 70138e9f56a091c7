"""The first half of an expert in one launch, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.dispatch import backend
from vexact.ops.moe.grouped_linear import check_grouped_linear, grouped_linear
from vexact.ops.moe.groups import ExpertGroups
from vexact.ops.swiglu import swiglu


def grouped_swiglu(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """``swiglu(grouped_linear(x, weight, groups, gather=gather))``, bit for bit.

    Where no gradient is asked for, (P, 2I) is never stored; otherwise the two operators run one after the other.

    Args:
        x: (T, K) with ``gather``, else (P, K). weight: (E, 2I, K), an expert's gate above its up.

    Returns:
        (P, I), in which rows past the last place that is taken mean nothing. Differentiable in ``x`` and ``weight``.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together, or an odd number of rows per expert.
    """
    check_grouped_linear("grouped_swiglu", x, weight, groups, gather)
    if weight.shape[1] % 2:
        raise ValueError(f"grouped_swiglu: weight has {weight.shape[1]} rows per expert; gate and up are equally many")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return swiglu(grouped_linear(x, weight, groups, gather=gather))
    rows = groups.rows if gather else None
    op = backend("moe.grouped_linear", x)
    return op.swiglu_forward(x.contiguous(), weight.contiguous(), rows, groups.offsets, groups.top_k)
