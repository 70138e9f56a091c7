"""CPU twin of linear: fp32 products over fixed-size row blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.cpu.product import product


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """(M, K) x (N, K) -> (M, N); low-precision inputs are widened, which is exact, so accumulation is fp32."""
    out = product(x.float(), weight.float().T)
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """(M, N) -> (M, K)."""
    return product(dy.float(), weight.float()).to(dy.dtype)


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """(M, N), (M, K) -> (N, K)."""
    return (dy.float().T @ x.float()).to(x.dtype)


def grad_bias(dy: Tensor) -> Tensor:
    """(M, N) -> (N,)."""
    return dy.float().sum(0).to(dy.dtype)
