"""A token's expert rows back into one, added in the order of the experts' index."""

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


def combine(y: Tensor, weights: Tensor, groups: ExpertGroups, shared: Tensor | None = None) -> Tensor:
    """Per token the sum of its k rows of ``y``, each times its weight, then plus ``shared``, rounded once.

    The sum starts at 0 and takes one fp32 fused multiply-add per expert, ascending; a pair without expert is left out.

    Args:
        y: (P, H), fp32, bf16 or fp16. weights: (T, k) fp32. shared: (T, H) in ``y``'s dtype (shared experts), or None.

    Returns:
        (T, H). Differentiable in ``y``, ``weights`` and ``shared``.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together.
    """
    check_dims("combine", 2, "(P, H)", y=y)
    check_floats("combine", y=y) if shared is None else check_floats("combine", y=y, shared=shared)
    check_groups("combine", y, groups)
    num_places, tokens = groups.rows.shape[0], groups.slots.shape[0]
    if y.shape[0] != num_places:
        raise ValueError(f"combine: y has {y.shape[0]} rows but there are {num_places} places")
    if weights.shape != groups.slots.shape:
        raise ValueError(f"combine: weights is {tuple(weights.shape)}, expected {tuple(groups.slots.shape)}")
    if weights.dtype != torch.float32:
        raise ValueError(f"combine: weights are {weights.dtype}, expected torch.float32 as route gives them")
    if weights.device != y.device:
        raise ValueError(f"combine: y is on {y.device} but weights is on {weights.device}")
    if shared is not None and shared.shape != (tokens, y.shape[1]):
        raise ValueError(f"combine: shared is {tuple(shared.shape)}, expected {(tokens, y.shape[1])}")
    return apply(_Combine, y, weights, groups.slots, shared)


def combine_reference(y: Tensor, weights: Tensor, groups: ExpertGroups, shared: Tensor | None = None) -> Tensor:
    """The same in fp64."""
    taken = groups.slots >= 0
    rows = torch.where(taken.unsqueeze(2), y.double()[groups.slots.long().clamp_min(0)], 0.0)
    out = (rows * weights.double().unsqueeze(2)).sum(1)
    return out if shared is None else out + shared.double()


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, slots: Tensor, shared: Tensor | None) -> Tensor:
        y, weights = y.contiguous(), weights.contiguous()
        ctx.save_for_backward(y, weights, slots)
        shared = None if shared is None else shared.contiguous()
        return backend("moe.combine", y).forward(y, weights, slots, shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        y, weights, slots = ctx.saved_tensors
        dy = dweights = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dy, dweights = backend("moe.combine", y).backward(dout.contiguous(), y, weights, slots)
        return dy, dweights, None, dout if ctx.needs_input_grad[3] else None
