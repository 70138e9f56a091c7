"""RMSNorm in Triton: forward, forward fused with the residual addition, and backward.

A row's bits depend on that row and on its length D alone. The tile shape and warp count are functions of D, so the
order of the sum of squares is fixed; floating-point contraction is off, so the fused and the plain form, which are one
kernel, round at the same places; and inputs are 16-byte aligned, so one compiled layout serves every call of a given D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels import chain
from vexact.ops.kernels.chain import follow
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

_forward, _backward, _partials = Launches(), Launches(), Launches()
PARTIAL_CONFIG = {"BLOCK_P": 256, "BLOCK_D": 16, "num_warps": 4}


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x_ptr,  # (M, D)
    residual_ptr,  # (M, D), read only if HAS_RESIDUAL
    weight_ptr,  # (D,)
    y_ptr,  # (M, D)
    total_ptr,  # (M, D), written only if HAS_RESIDUAL
    rstd_ptr,  # (M,) fp32
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    mask = (rows < num_rows)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    dtype = y_ptr.dtype.element_ty

    # first, because no load is moved above a store: a decode step waits for every one of them
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        total = (value + residual).to(dtype)
        tl.store(total_ptr + offsets, total, mask=mask)
        value = total.to(tl.float32)

    mean_square = tl.sum(value * value, axis=1) / D
    rstd = tl.rsqrt(mean_square + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)

    normed = (value * rstd[:, None]).to(dtype).to(tl.float32)
    tl.store(y_ptr + offsets, (normed * weight[None, :]).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_block"])
def _backward_kernel(
    dy_ptr,  # (M, D)
    x_ptr,  # (M, D)
    weight_ptr,  # (D,)
    rstd_ptr,  # (M,) fp32
    dx_ptr,  # (M, D)
    partial_ptr,  # (row blocks, D) fp32: weight gradient of each block of rows
    num_rows,
    rows_per_block,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    block = tl.program_id(0)
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, num_rows)
    columns = tl.arange(0, BLOCK_D)
    in_row = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    for start in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < last)[:, None] & in_row[None, :]
        offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < last, other=0.0)[:, None]
        normed = x * rstd
        scaled = dy * weight[None, :]
        projection = tl.sum(scaled * normed, axis=1)[:, None] / D
        dx = rstd * (scaled - normed * projection)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        # The weight multiplied the rounded normalised row, so its gradient does too.
        dweight += dy * normed.to(x_ptr.dtype.element_ty).to(tl.float32)

    tl.store(partial_ptr + block.to(tl.int64) * D + columns, tl.sum(dweight, axis=0), mask=in_row)


@triton.jit(do_not_specialize=["num_partials"])
def _sum_partials_kernel(
    partial_ptr,  # (P, D) fp32
    out_ptr,  # (D,)
    num_partials,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < D
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < num_partials)[:, None] & in_row[None, :]
        total += tl.load(partial_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=in_row)


def forward_config(width: int) -> dict[str, int]:
    """Tile and warp count of the forward kernel: a function of the row length only, because they decide bits."""
    block_d = next_power_of_2(width)
    block_m = max(1, 2048 // block_d)
    return {"BLOCK_M": block_m, "BLOCK_D": block_d, "num_warps": min(16, max(4, block_d // 1024))}


def backward_config(width: int) -> dict[str, int]:
    """Tile, pipeline depth and warp count of the backward kernel, from the row length only."""
    block_d = next_power_of_2(width)
    if block_d < 2048:
        return {"BLOCK_M": 2048 // block_d, "BLOCK_D": block_d, "STAGES": 3, "num_warps": 4}
    return {"BLOCK_M": 2 if block_d <= 4096 else 1, "BLOCK_D": block_d, "STAGES": 3, "num_warps": 8}


def row_block(num_rows: int, width: int) -> int:
    """Rows that one program of the backward walks: whole tiles, and so many that the programs fill a GPU about once.

    The number of programs decides the bits of the weight gradient, so it is not taken from the GPU at hand.
    """
    tile_rows = backward_config(width)["BLOCK_M"]
    max_programs = 512 if width < 2048 else 256
    tiles = cdiv(num_rows, tile_rows)
    return max(1, cdiv(tiles, max_programs)) * tile_rows


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``y = weight * (x * rstd).to(dtype)`` with ``rstd = rsqrt(mean(x^2) + eps)`` in fp32.

    Args:
        x: (M, D) contiguous. weight: (D,).

    Returns:
        y (M, D) in the dtype of ``x``; rstd (M,) fp32.
    """
    x = _aligned(x)
    y = torch.empty_like(x)
    return y, _launch_forward(x, None, weight, y, None, eps)


def add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``forward(x + residual)`` and the sum itself, which is rounded to the dtype of ``x`` before it is normalised.

    Args:
        x, residual: (M, D) contiguous, one dtype. weight: (D,).

    Returns:
        y (M, D), new residual (M, D), rstd (M,) fp32.
    """
    x, residual = _aligned(x), _aligned(residual)
    y, total = torch.empty_like(x), torch.empty_like(x)
    return y, total, _launch_forward(x, residual, weight, y, total, eps)


def backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`forward`: the input's row by row, the weight's as a fixed two-level sum over rows.

    Args:
        dy, x: (M, D) contiguous. weight: (D,). rstd: (M,) fp32 from the forward.

    Returns:
        dx (M, D) in the dtype of ``x``; dweight (D,) in the dtype of ``weight``.
    """
    num_rows, width = x.shape
    dy, x, weight = _aligned(dy), _aligned(x), _aligned(weight.contiguous())
    rows_per_block = row_block(num_rows, width)
    num_blocks = cdiv(num_rows, rows_per_block)
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    partial = torch.empty((num_blocks, width), dtype=torch.float32, device=x.device)
    tensors = dy, x, weight, rstd, dx, partial
    _backward(
        (num_rows, width, x.dtype, weight.dtype),
        tensors,
        lambda: Call(
            _backward_kernel,
            (num_blocks,),
            (*tensors, num_rows, rows_per_block),
            {"D": width, **backward_config(width), "enable_fp_fusion": False},
        ),
    )
    _partials(
        (num_blocks, width, weight.dtype),
        (partial, dweight),
        lambda: Call(
            _sum_partials_kernel,
            (cdiv(width, PARTIAL_CONFIG["BLOCK_D"]),),
            (partial, dweight, num_blocks),
            {"D": width, **PARTIAL_CONFIG, "enable_fp_fusion": False},
        ),
    )
    return dx, dweight


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor | None, eps: float
) -> Tensor:
    num_rows, width = x.shape
    weight = _aligned(weight.contiguous())
    rstd = x.new_empty(num_rows, dtype=torch.float32)

    def call() -> Call:
        config = forward_config(width)
        return Call(
            _forward_kernel,
            (cdiv(num_rows, config["BLOCK_M"]),),
            (x, x if residual is None else residual, weight, y, x if total is None else total, rstd, num_rows, eps),
            {
                **{"D": width, "HAS_RESIDUAL": residual is not None, **config, "enable_fp_fusion": False},
                **chain.options(num_rows, overlaps(x.device), may_be_early=True),
            },
        )

    if residual is None or total is None:
        _forward((num_rows, width, x.dtype, weight.dtype, eps), (x, weight, y, rstd), call)
    else:
        _forward((num_rows, width, x.dtype, weight.dtype, eps, "add"), (x, residual, weight, y, total, rstd), call)
    return rstd


def _aligned(tensor: Tensor) -> Tensor:
    # Triton compiles another layout, and so another order of additions, for pointers that are not 16-byte aligned.
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
