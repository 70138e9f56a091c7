"""CPU twin of qk_norm_rope: the twins of its two parts."""

from __future__ import annotations

from torch import Tensor

from vexact.ops.cpu import rms_norm
from vexact.ops.cpu.rotary import rope


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated q and k, (T, heads, D), and the rstd of each head, (T, heads) fp32."""
    (q_normed, q_rstd), (k_normed, k_rstd) = _norm(q, q_weight, eps), _norm(k, k_weight, eps)
    return *rope.forward(q_normed, k_normed, positions, cos_sin, False), q_rstd, k_rstd


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = rms_norm.forward(x.reshape(-1, x.shape[-1]), weight, eps)
    return y.view(x.shape), rstd.view(x.shape[:-1])
