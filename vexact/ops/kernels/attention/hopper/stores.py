"""How a warp group writes finished rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vexact.ops.kernels.attention.hopper.shared import ROWS


@gluon.jit
def store_columns(
    target, staging, value, start, first, head, length,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Write COLUMNS columns, from COLUMN on, of the rows from `first` on that lie in a sequence (start, length) of
    target (rows, HEADS, WIDTH), by way of a tile in shared memory, so that neighbouring threads write neighbouring
    bytes."""
    staging.store(value.to(target.dtype.element_ty))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    flat = ((start + row).to(gl.int64) * HEADS + head) * WIDTH + COLUMN
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    gl.store(target + flat[:, None] + columns[None, :], staging.load(layout), mask=(row < length)[:, None])
