"""CPU twin of rope."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.checks import out_of_range


def forward(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotates (T, heads, D) by +angle, or by -angle when ``inverse``."""
    try:
        rows = cos_sin.index_select(0, positions)
    except (IndexError, RuntimeError):
        raise out_of_range("rope", "positions", positions, cos_sin.shape[0]) from None
    cos, sin = rows.unsqueeze(1).chunk(2, dim=-1)  # (T, 1, D/2)
    if inverse:
        sin = -sin
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
