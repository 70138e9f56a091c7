"""CPU twin of embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import out_of_range


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """(T,), (V, H) -> (T, H)."""
    try:
        return weight.index_select(0, ids)
    except (IndexError, RuntimeError):
        raise out_of_range("embedding", "ids", ids, weight.shape[0]) from None


def backward(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """(T, H) -> (V, H); index_add_ adds sequentially over tokens on CPU."""
    out = torch.zeros(num_rows, dy.shape[1], dtype=torch.float32)
    return out.index_add_(0, ids, dy.float()).to(dy.dtype)
