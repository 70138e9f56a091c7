"""RMSNorm, alone or with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vexact.models.opset import OpSet


class RMSNorm(nn.Module):
    """Holds the weight of a norm; adds a residual first when given one."""

    def __init__(self, width: int, eps: float, ops: OpSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ops.rms_norm(x, self.weight, self.eps)
        return out

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        normed, total = self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return normed, total
