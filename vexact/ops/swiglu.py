"""Gated SiLU activation (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``gate_up = [gate | up]`` (M, 2I) -> (M, I); fp32 arithmetic, one rounding.

    Raises:
        ValueError: ``gate_up`` is not two-dimensional, of an even width, in a supported dtype.
    """
    check_dims("swiglu", 2, "(M, 2I)", gate_up=gate_up)
    check_floats("swiglu", gate_up=gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up has width {gate_up.shape[1]}; it must be even, gate and up side by side")
    return apply(_SwiGLU, gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The formula in fp64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return backend("swiglu", gate_up).forward(gate_up.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return backend("swiglu", gate_up).backward(dy.contiguous(), gate_up.contiguous())
