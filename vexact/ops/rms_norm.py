"""Root-mean-square normalisation, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import alike, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x * rsqrt(mean(x^2) + eps))`` over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    The statistics and the product with ``rsqrt`` are fp32; the normalised row is rounded to the dtype of ``x`` before
    it is multiplied by ``weight``, as Hugging Face models do.

    Args:
        x: (..., D). weight: (D,).

    Returns:
        (..., D) in the dtype of ``x``.

    Raises:
        ValueError: a weight that is not (D,) of the dtype of ``x``.
    """
    _check(x, weight)
    if x.dim() == 2:
        return apply(_RMSNorm, x, weight, eps)
    return apply(_RMSNorm, x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``: the same bits as the two ops apart.

    Args:
        x, residual: (..., D) of one dtype. weight: (D,).

    Raises:
        ValueError: as :func:`rms_norm`, or ``x`` and ``residual`` differ in shape or dtype.
    """
    _check(x, weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x is {tuple(x.shape)} but residual is {tuple(residual.shape)}")
    if not alike(x, residual):
        check_floats("add_rms_norm", x=x, residual=residual)
    if x.dim() == 2:
        return apply(_AddRMSNorm, x, residual, weight, eps)
    width = x.shape[-1]
    normed, total = apply(_AddRMSNorm, x.reshape(-1, width), residual.reshape(-1, width), weight, eps)
    return normed.view(x.shape), total.view(x.shape)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in fp64, without intermediate rounding."""
    wide = x.double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)}, expected ({x.shape[-1]},)")
    if not alike(x, weight):
        check_floats("rms_norm", x=x, weight=weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = backend("rms_norm", x).forward(x.contiguous(), weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = backend("rms_norm", x).backward(dy.contiguous(), x.contiguous(), weight, rstd)
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        op = backend("rms_norm", x)
        y, total, rstd = op.add_forward(x.contiguous(), residual.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = backend("rms_norm", total).backward(dy.contiguous(), total, weight, rstd)
        dx = dx + dtotal
        return dx, dx, dweight, None
