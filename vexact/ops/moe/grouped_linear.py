"""Matrix products of rows with the matrix of their expert; a row has the bits that ``linear`` gives it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend
from vexact.ops.moe.checks import check_groups
from vexact.ops.moe.groups import ExpertGroups


def grouped_linear(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """Row p is ``row @ weight[e].T`` with the expert e of place p: fp32 accumulation over K in order, one rounding.

    The row is that of the place's token with ``gather``, else ``x[p]``. No copy of gathered rows is kept for the
    backward. There the places of a token are added in the order of its experts, and the gradient of an expert's matrix
    walks its places in order; an expert without any gets zeros.

    Args:
        x: (T, K) with ``gather``, else (P, K); fp32, bf16 or fp16.
        weight: (E, N, K), same dtype.

    Returns:
        (P, N), in which rows past the last place that is taken mean nothing. Differentiable in ``x`` and ``weight``.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together.
    """
    check_grouped_linear("grouped_linear", x, weight, groups, gather)
    return apply(_GroupedLinear, x, weight, *groups, gather)


def check_grouped_linear(op: str, x: Tensor, weight: Tensor, groups: ExpertGroups, gather: bool) -> None:
    """
    Raises:
        ValueError: the arguments of :func:`grouped_linear`, for ``op``, do not fit together.
    """
    check_dims(op, 2, "(T, K)" if gather else "(P, K)", x=x)
    check_dims(op, 3, "(E, N, K)", weight=weight)
    check_floats(op, x=x, weight=weight)
    check_groups(op, x, groups)
    if x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"{op}: x has K={x.shape[1]} but weight is {tuple(weight.shape)}, expected (E, N, {x.shape[1]})"
        )
    if groups.offsets.shape[0] != weight.shape[0] + 1:
        raise ValueError(
            f"{op}: weight has {weight.shape[0]} experts but the tokens are grouped for "
            f"{groups.offsets.shape[0] - 1}; pass the same number to group_tokens"
        )
    expected = groups.slots.shape[0] if gather else groups.rows.shape[0]
    if x.shape[0] != expected:
        what = "tokens, which gather=True reads" if gather else "places, which gather=False reads"
        raise ValueError(f"{op}: x has {x.shape[0]} rows but there are {expected} {what}")


def grouped_linear_reference(x: Tensor, weight: Tensor, groups: ExpertGroups, *, gather: bool) -> Tensor:
    """The same in fp64; zeros past the last place."""
    wide, matrices = x.double(), weight.double()
    offsets = groups.offsets.tolist()
    rows = wide[groups.rows.long() // groups.top_k] if gather else wide
    parts = [rows[a:b] @ matrix.T for a, b, matrix in zip(offsets, offsets[1:], matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - offsets[-1], weight.shape[1])])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, slots: Tensor, offsets: Tensor, gather: bool
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, rows, slots, offsets)
        ctx.gather = gather
        return backend("moe.grouped_linear", x).forward(x, weight, rows if gather else None, offsets, slots.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, weight, rows, slots, offsets = ctx.saved_tensors
        op = backend("moe.grouped_linear", x)
        dy, dx, dweight = dy.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = op.grad_input(dy, weight, offsets)
            if ctx.gather:
                dx = backend("moe.combine", dx).total(dx, slots)
        if ctx.needs_input_grad[1]:
            dweight = op.grad_weight(dy, x, rows if ctx.gather else None, offsets, slots.shape[1])
        return dx, dweight, None, None, None, None
