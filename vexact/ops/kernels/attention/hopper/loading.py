"""How producers find the rows of a tile, load the tiles that consumers walk, and clear what no sequence has."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.hopper.shared import ROWS, find_sequence


class Owned(NamedTuple):
    """A tile of 2 * ROWS rows of a sequence, and the rows on the other side of its scores."""

    start: tl.tensor  # of the sequence
    length: tl.tensor
    other_start: tl.tensor
    other_length: tl.tensor
    first: tl.tensor  # row of the tile in the sequence; it may lie past the end, and the tile is empty then


class Pair(NamedTuple):
    """Two matrices that are walked together: keys and values, or queries and the gradient of the output."""

    wide: Columns  # descriptors, or tiles in shared memory
    narrow: tl.tensor


@gluon.constexpr_function
def first_width(width):
    """Columns of the first of the tiles that hold rows so wide: 128 of 192, all where it is a power of two."""
    return 1 << (width.bit_length() - 1)


@gluon.constexpr_function
def rest_width(width):
    """Columns of the second of them; 0 if there is none."""
    return width - first_width(width)


@gluon.jit
def find_tile(cu_seqlens, cu_seqlens_other, num_sequences, tile):
    sequence, block = find_sequence(cu_seqlens, num_sequences, tile, 2 * ROWS)
    start = gl.load(cu_seqlens + sequence)
    other_start = gl.load(cu_seqlens_other + sequence)
    length = gl.load(cu_seqlens + sequence + 1) - start
    other_length = gl.load(cu_seqlens_other + sequence + 1) - other_start
    return Owned(start, length, other_start, other_length, block * 2 * ROWS)


@gluon.jit
def stage_of(tiles, stage, D: gl.constexpr):
    """One stage of a ring of tiles in one or two parts."""
    first = tiles.first.index(stage)
    rest = first
    if rest_width(D) > 0:
        rest = tiles.rest.index(stage)
    return Columns(first, rest)


@gluon.jit
def copy_pair(descs, row, wide_column, narrow_column, wide, narrow, barrier, HEIGHT: gl.constexpr,
              D: gl.constexpr, DV: gl.constexpr):  # fmt: skip
    """Start to load HEIGHT rows of 2-byte elements of both matrices; the barrier completes when they have come."""
    mbarrier.expect(barrier, 2 * HEIGHT * (D + DV))
    tma.async_copy_global_to_shared(descs.wide.first, [row, wide_column], barrier, wide.first)
    if rest_width(D) > 0:
        tma.async_copy_global_to_shared(descs.wide.rest, [row, wide_column + first_width(D)], barrier, wide.rest)
    tma.async_copy_global_to_shared(descs.narrow, [row, narrow_column], barrier, narrow)


@gluon.jit
def clear_after(tile, inside, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Put zeros after the first `inside` rows of a tile, by one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    for part in gl.static_range(HEIGHT // 8):
        if part * 8 + 8 > inside:
            some = tile.slice(part * 8, 8)
            keep = part * 8 + gl.arange(0, 8, gl.SliceLayout(1, layout)) < inside
            some.store(gl.where(keep[:, None], some.load(layout), 0.0))


@gluon.jit
def load_pair(
    descs, row, wide_column, narrow_column, tiles, stage, full, tail, tail_phase, inside,
    HEIGHT: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """Load HEIGHT rows of both matrices, of which the first `inside` belong to the sequence. The others become zeros,
    since a weight of 0 does not hide a NaN: that tile is waited for here. Returns the next phase of `tail`."""
    wide = stage_of(tiles.wide, stage, D)
    narrow = tiles.narrow.index(stage)
    if inside >= HEIGHT:
        copy_pair(descs, row, wide_column, narrow_column, wide, narrow, full, HEIGHT, D, DV)
    else:
        copy_pair(descs, row, wide_column, narrow_column, wide, narrow, tail.index(0), HEIGHT, D, DV)
        mbarrier.wait(tail.index(0), tail_phase)
        clear_after(wide.first, inside, HEIGHT, first_width(D))
        if rest_width(D) > 0:
            clear_after(wide.rest, inside, HEIGHT, rest_width(D))
        clear_after(narrow, inside, HEIGHT, DV)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        tail_phase ^= 1
    return tail_phase


@gluon.jit
def load_own(
    descs, row, wide_column, narrow_column, tiles, full, empty, phase, D: gl.constexpr, DV: gl.constexpr
):  # fmt: skip
    """Load the rows of both consumers once they have let go of those before. Rows past the end are another sequence's:
    a row of a tile only reaches its own row of the result, which is not stored."""
    for part in gl.static_range(2):
        mbarrier.wait(empty.index(part), phase)
        copy_pair(
            descs, row + part * ROWS, wide_column, narrow_column, stage_of(tiles.wide, part, D),
            tiles.narrow.index(part), full.index(part), ROWS, D, DV,
        )  # fmt: skip


@gluon.jit
def clear_rows(target, first, num_rows, head, HEADS: gl.constexpr, WIDTH: gl.constexpr):
    """Write 0 to one head of a tile of rows of target (num_rows, HEADS, WIDTH)."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    zeros = gl.zeros([4, 64], target.dtype.element_ty, layout)
    for start in range(first, gl.minimum(first + 2 * ROWS, num_rows), 4):
        row = start + gl.arange(0, 4, gl.SliceLayout(1, layout))
        rows = (row.to(gl.int64) * HEADS + head) * WIDTH
        for column in gl.static_range(0, WIDTH, 64):
            columns = column + gl.arange(0, 64, gl.SliceLayout(0, layout))
            gl.store(target + rows[:, None] + columns[None, :], zeros, mask=(row < num_rows)[:, None])


@gluon.jit
def allocate_pair(
    desc, rest_desc, narrow_desc, COUNT: gl.constexpr, HEIGHT: gl.constexpr, D: gl.constexpr, DV: gl.constexpr
):  # fmt: skip
    """Rings of COUNT tiles for both matrices."""
    dtype: gl.constexpr = narrow_desc.dtype
    first = gl.allocate_shared_memory(dtype, [COUNT, HEIGHT, first_width(D)], desc.layout)
    rest = first
    if rest_width(D) > 0:
        rest = gl.allocate_shared_memory(dtype, [COUNT, HEIGHT, rest_width(D)], rest_desc.layout)
    return Pair(Columns(first, rest), gl.allocate_shared_memory(dtype, [COUNT, HEIGHT, DV], narrow_desc.layout))
