"""Arguments that the warp-specialised kernels have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vexact.ops.kernels.attention.descriptors import head_step, row_width
from vexact.ops.kernels.attention.launch import HeadShape
from vexact.ops.kernels.linear.launch import multiprocessors

ROWS = 64  # query rows, or keys, of a consumer: two make a tile


def described(rows: Tensor, height: int, columns: int | None = None) -> TensorDescriptor:
    """Boxes of so many rows and columns, those of a head if omitted, of packed rows or of the rows of all pages."""
    shape, strides = [rows.shape[:-2].numel(), row_width(rows)], [rows.stride(-3), 1]
    box = [height, columns or rows.shape[-1]]
    return TensorDescriptor(rows, shape, strides, box, NVMMASharedLayout(128, 16, rank=2))


def tiles_and_programs(rows: Tensor, cu_seqlens: Tensor, heads: int) -> tuple[int, int]:
    """Tiles of 128 rows at most, and the programs that draw them for all heads."""
    tiles = rows.shape[0] // (2 * ROWS) + cu_seqlens.shape[0]
    return tiles, min(multiprocessors(rows.device), tiles * heads)


def head_constants(shape: HeadShape, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    return {
        "GROUP": shape.group, "D": shape.dim, "DV": shape.value_dim, "CAUSAL": causal,
        "STEP_Q": head_step(q), "STEP_K": head_step(k), "STEP_V": head_step(v), "num_warps": 4,
    }  # fmt: skip
