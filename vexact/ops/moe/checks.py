"""What the operators over expert groups refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import check_dims
from vexact.ops.moe.groups import ExpertGroups


def check_groups(op: str, tensor: Tensor, groups: ExpertGroups) -> None:
    """
    Raises:
        ValueError: ``groups`` are not as :func:`vexact.ops.group_tokens` makes them, or on another device than the
            tensor they are used with.
    """
    rows, slots, offsets = groups
    check_dims(op, 2, "(T, k)", slots=slots)
    check_dims(op, 1, "one axis", rows=rows, offsets=offsets)
    for name, part in zip(groups._fields, groups):
        if part.dtype != torch.int32:
            raise ValueError(f"{op}: {name} is {part.dtype}, expected torch.int32 as group_tokens gives it")
        if part.device != tensor.device:
            raise ValueError(f"{op}: {name} is on {part.device} but the rows are on {tensor.device}")
        if not part.is_contiguous():
            raise ValueError(
                f"{op}: {name} has strides {part.stride()}; it must be contiguous, as group_tokens gives it"
            )
    if rows.shape[0] != slots.numel():
        raise ValueError(f"{op}: {rows.shape[0]} rows but slots is {tuple(slots.shape)}; use both of one group_tokens")
