"""Matrix product with the same bits for a row whatever the other rows are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import alike, check_dims, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """``x @ weight.T + bias`` with fp32 accumulation over K in one fixed order and one final rounding.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        weight: (N, K), same dtype as ``x``.
        bias: (N,) or None; added in fp32 before the rounding.
        out_dtype: dtype of the result, default that of ``x``; fp32 keeps logits unrounded.

    Returns:
        (..., N). Differentiable in all three tensors.

    Raises:
        ValueError: mismatching sizes or dtypes, or a dtype that is not supported.
    """
    if weight.dim() != 2:
        check_dims("linear", 2, "(N, K)", weight=weight)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x has K={x.shape[-1]} but weight is {tuple(weight.shape)}, expected (N, {x.shape[-1]})"
        )
    if not alike(x, weight):
        check_floats("linear", x=x, weight=weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias is {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if x.dim() == 2:
        return apply(_Linear, x, weight, bias, out_dtype or x.dtype)
    out = apply(_Linear, x.reshape(-1, x.shape[-1]), weight, bias, out_dtype or x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product in fp64."""
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return backend("linear", x).forward(x, weight, bias, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        op = backend("linear", x)
        dy = dy.to(x.dtype).contiguous()
        dx = op.grad_input(dy, weight) if ctx.needs_input_grad[0] else None
        dweight = op.grad_weight(dy, x) if ctx.needs_input_grad[1] else None
        dbias = op.grad_bias(dy) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None
