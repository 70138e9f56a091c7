"""CPU twin of rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.cpu.reduce import tree_sum


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(M, D) -> y (M, D), rstd (M,) fp32."""
    wide = x.float()
    rstd = 1.0 / torch.sqrt(tree_sum(wide * wide) / x.shape[-1] + eps)
    return weight * (wide * rstd.unsqueeze(1)).to(x.dtype), rstd


def add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x + residual (both (M, D)) and rstd (M,)."""
    total = x + residual
    y, rstd = forward(total, weight, eps)
    return y, total, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dx = rstd * (w*dy - xhat * mean(w*dy*xhat)), dweight = sum over rows of dy * xhat."""
    xhat = x.float() * rstd.unsqueeze(1)
    scaled = dy.float() * weight.float()
    mean = tree_sum(scaled * xhat).unsqueeze(1) / x.shape[-1]
    dx = rstd.unsqueeze(1) * (scaled - xhat * mean)
    return dx.to(x.dtype), (dy.float() * xhat).sum(0).to(weight.dtype)
