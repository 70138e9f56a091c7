"""Sums of squares along the rows of many matrices in one launch, each element read once.

A program takes some rows of one stretch of columns of one matrix. Its lanes are the columns of a tile, so that adding a
tile to the last one is an operation between elements; the lanes are added in pairs. No addition is left to a layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.logprob import pair_sum_columns
from vexact.ops.kernels.sizes import next_power_of_2
from vexact.ops.kernels.tables import on_device
from vexact.ops.square_sums import LANES, STRETCH, num_stretches

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_TILE = 1024  # elements: eight of each thread
_TILE_ROWS = 4  # tiles that a program takes one below the other
_WIDE = 16  # bytes of the widest load


@triton.jit
def _square_sums_kernel(
    matrix_ptr,  # (M, 6) int64: address, rows, columns, first output, stretches of a row, first program
    owner_ptr,  # (P,) int32: the matrix of a program
    out_ptr,  # (N,) fp32
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # addresses of rows are multiples of 16
    WIDE: tl.constexpr,  # elements in 16 bytes
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    STEPS: tl.constexpr,  # tiles that cover a stretch
    TILE_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    matrix = matrix_ptr + 6 * tl.load(owner_ptr + program)
    address, num_rows, width = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
    first_out, stretches, first_program = tl.load(matrix + 3), tl.load(matrix + 4), tl.load(matrix + 5)
    values = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
        width = tl.multiple_of(width, WIDE)
    own = program - first_program
    stretch = own % stretches
    first_row = own // stretches * (TILE_ROWS * ROWS)
    columns = stretch * (STEPS * LANES) + tl.arange(0, LANES)
    for below in tl.static_range(TILE_ROWS):
        rows = first_row + below * ROWS + tl.arange(0, ROWS)
        start = values + rows[:, None] * width
        total = tl.zeros((ROWS, LANES), dtype=tl.float32)
        for step in tl.static_range(STEPS):
            column = columns + step * LANES
            mask = (rows < num_rows)[:, None] & (column < width)[None, :]
            x = tl.load(start + column[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x * x
        sums = pair_sum_columns(total, LEVELS)
        tl.store(out_ptr + first_out + rows * stretches + stretch, sums, mask=rows < num_rows)


def tile(width: int) -> dict[str, int]:
    """Lanes and rows of a tile. Lanes that a narrow row leaves empty would add zeros: fewer of them change no bit."""
    lanes = min(LANES, next_power_of_2(width))
    return {
        "ROWS": _TILE // lanes,
        "LANES": lanes,
        "LEVELS": lanes.bit_length() - 1,
        "STEPS": STRETCH // LANES if lanes == LANES else 1,
        "TILE_ROWS": _TILE_ROWS,
        "num_warps": 4,
    }


def square_sums(matrices: Sequence[Tensor], out: Tensor, offsets: Sequence[int]) -> None:
    """Matrices (R, D) contiguous, out (N,) fp32; see ``ops.square_sums``.

    One launch serves all matrices of one dtype that are equally aligned and whose rows have as many lanes.
    """
    groups: dict[tuple[torch.dtype, bool, int], list[tuple[int, ...]]] = {}
    for matrix, offset in zip(matrices, offsets, strict=True):
        if matrix.numel():
            rows, width = matrix.shape
            address, row_bytes = matrix.data_ptr(), width * matrix.element_size()
            key = matrix.dtype, address % _WIDE == row_bytes % _WIDE == 0, tile(width)["LANES"]
            groups.setdefault(key, []).append((address, rows, width, offset, num_stretches(width)))
    for (dtype, aligned, lanes), group in groups.items():
        _launch(out, np.array(group, np.int64), dtype, aligned, lanes)


def _launch(out: Tensor, table: np.ndarray, dtype: torch.dtype, aligned: bool, lanes: int) -> None:
    config = tile(lanes)
    programs = -(-table[:, 1] // (config["TILE_ROWS"] * config["ROWS"])) * table[:, 4]
    matrices = np.column_stack([table, np.cumsum(programs) - programs])
    owners = np.repeat(np.arange(len(table), dtype=np.int32), programs)
    packed = on_device(np.concatenate([matrices.ravel().view(np.int32), owners]), out.device)
    matrix_table, owner = packed.split([2 * matrices.size, len(owners)])
    _square_sums_kernel[(len(owners),)](
        matrix_table.view(torch.int64),
        owner,
        out,
        TYPE=TYPES[dtype],
        ALIGNED=aligned,
        WIDE=_WIDE // dtype.itemsize,
        **config,
        enable_fp_fusion=False,
    )
