"""Sums whose order depends on the length of the axis only."""

from __future__ import annotations

from torch import Tensor


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by halving: x[i] + x[i + ceil(n/2)], repeatedly. (..., n) -> (...)."""
    length = x.shape[-1]
    while length > 1:
        half = (length + 1) // 2
        folded = x[..., :half].clone()
        folded[..., : length - half] += x[..., half:length]
        x, length = folded, half
    return x.squeeze(-1)
