"""CPU twin of the counting sort."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import out_of_range


def forward(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, k) int32 -> rows (P,), slots (T, k), offsets (E+1,), all int32."""
    flat = experts.flatten().long()
    if flat.numel() and int(flat.max()) >= num_experts:
        raise out_of_range("group_tokens", "experts", flat[flat >= 0], num_experts)
    taken = flat >= 0
    counts = torch.bincount(flat[taken], minlength=num_experts)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    offsets[1:] = counts.cumsum(0)
    order = torch.where(taken, flat, num_experts).argsort(stable=True)[: int(offsets[-1])]
    rows = torch.zeros(flat.numel(), dtype=torch.int32)
    rows[: len(order)] = order.int()
    slots = torch.full((flat.numel(),), -1, dtype=torch.int32)
    slots[order] = torch.arange(len(order), dtype=torch.int32)
    return rows, slots.view(experts.shape), offsets
