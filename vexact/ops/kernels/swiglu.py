"""SwiGLU in Triton, forward and backward: elementwise fp32 arithmetic without contraction, one rounding per output."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels import chain
from vexact.ops.kernels.chain import follow
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.sizes import cdiv, column_blocks

_forward, _backward = Launches(), Launches()


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward_kernel(
    gate_up_ptr,  # (M, 2 * I)
    out_ptr,  # (M, I)
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    gate_ptr = gate_up_ptr + row * (2 * I) + columns
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + I, mask=mask, other=0.0).to(tl.float32)
    out = gate * sigmoid(gate) * up
    tl.store(out_ptr + row * I + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (M, I)
    gate_up_ptr,  # (M, 2 * I)
    grad_ptr,  # (M, 2 * I)
    I: tl.constexpr,  # noqa: E741
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < I
    offsets = row * (2 * I) + columns
    gate = tl.load(gate_up_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offsets + I, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * I + columns, mask=mask, other=0.0).to(tl.float32)
    share = sigmoid(gate)
    dgate = dy * up * share * (1.0 + gate * (1.0 - share))
    dup = dy * gate * share
    dtype = grad_ptr.dtype.element_ty
    tl.store(grad_ptr + offsets, dgate.to(dtype), mask=mask)
    tl.store(grad_ptr + offsets + I, dup.to(dtype), mask=mask)


def forward(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[gate | up]`` (M, 2I) contiguous -> (M, I) in the same dtype."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_rows, width))
    tensors = gate_up, out
    _forward(
        (num_rows, width, out.dtype),
        tensors,
        lambda: _call(_forward_kernel, tensors, num_rows, width, _chained(num_rows, out)),
    )
    return out


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient (M, 2I) of :func:`forward` from ``dy`` (M, I) and its input, both contiguous."""
    num_rows, width = dy.shape
    grad = torch.empty_like(gate_up)
    tensors = dy, gate_up, grad
    _backward((num_rows, width, grad.dtype), tensors, lambda: _call(_backward_kernel, tensors, num_rows, width, {}))
    return grad


def _chained(num_rows: int, out: Tensor) -> dict[str, int | bool]:
    return chain.options(num_rows, overlaps(out.device), may_be_early=True)


def _call(kernel: Any, tensors: tuple[Tensor, ...], num_rows: int, width: int, more: dict[str, Any]) -> Call:
    config = column_blocks(width)
    grid = num_rows, cdiv(width, config["BLOCK"])
    return Call(kernel, grid, tensors, {"I": width, **config, "enable_fp_fusion": False, **more})
