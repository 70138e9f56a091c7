"""Where a tile of keys lies, in consecutive rows or in pages, and how it travels: a box for each part of one page."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from vexact.ops.kernels.attention.hopper.loading import clear_after

LANES = gl.constexpr(32)


@gluon.constexpr_function
def box_height(page_size, tile_n):
    """Rows of a box of keys: the largest power of two that divides both, so that none reaches into a second page; the
    whole tile if packed (page_size 0)."""
    return min(page_size & -page_size, tile_n) if page_size > 0 else tile_n


@gluon.jit
def tile_rows(table, first_row, start, kv_len, TILE_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Where the boxes of the tile of keys at `start` begin: a row if packed; a row in each lane if paged.

    Only entries of the table that hold a key are read: a box past the last key is one of the last page again.
    """
    if PAGE_SIZE == 0:
        rows = first_row + start
    else:
        HEIGHT: gl.constexpr = box_height(PAGE_SIZE, TILE_N)
        lane = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
        key = gl.minimum(start + lane * HEIGHT, kv_len - 1)
        page = gl.load(table + key // PAGE_SIZE, mask=(lane < TILE_N // HEIGHT) & (key >= 0), other=0)
        rows = page * PAGE_SIZE + key % PAGE_SIZE // HEIGHT * HEIGHT
    return rows


@gluon.jit
def box_row(rows, part: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """The row of one box of `tile_rows`."""
    row = rows
    if PAGE_SIZE > 0:
        lane = gl.arange(0, LANES, gl.BlockedLayout([1], [LANES], [1], [0]))
        row = gl.sum(gl.where(lane == part, rows, 0), 0)
    return row


@gluon.jit
def load_boxes(desc, rows, column, full, tile, TILE_N: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Start loading a tile of TILE_N rows; `full` expects the bytes of all of them."""
    HEIGHT: gl.constexpr = box_height(PAGE_SIZE, TILE_N)
    for part in gl.static_range(TILE_N // HEIGHT):
        box = tile.slice(part * HEIGHT, HEIGHT)
        tma.async_copy_global_to_shared(desc, [box_row(rows, part, PAGE_SIZE), column], full, box)


@gluon.jit
def load_values(
    desc, rows, column, full, tile, tail, tail_phase, inside,
    TILE_N: gl.constexpr, DV: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """Load a tile of values, of which the first `inside` rows belong to the sequence, and complete `full`.

    Behind them another sequence begins, or a page has not been written: a weight of 0 does not hide a NaN, so the
    producer waits for such a tile itself and clears its end. Returns the next tail_phase.
    """
    NBYTES: gl.constexpr = desc.block_type.nbytes * (TILE_N // box_height(PAGE_SIZE, TILE_N))
    if inside >= TILE_N:
        mbarrier.expect(full, NBYTES)
        load_boxes(desc, rows, column, full, tile, TILE_N, PAGE_SIZE)
    else:
        mbarrier.expect(tail.index(0), NBYTES)
        load_boxes(desc, rows, column, tail.index(0), tile, TILE_N, PAGE_SIZE)
        mbarrier.wait(tail.index(0), tail_phase)
        tail_phase ^= 1
        clear_after(tile, inside, TILE_N, DV)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
    return tail_phase
