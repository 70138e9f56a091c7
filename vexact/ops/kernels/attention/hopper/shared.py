"""What the warps of a program share: tiles in shared memory and the barriers that hand them over."""

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from vexact.ops.kernels.attention import rows

find_sequence = gluon.jit(rows.find_sequence.fn)

ROWS = gl.constexpr(64)  # query rows of a warp group: the height of a wgmma instruction
STAGES = gl.constexpr(2)  # tiles of keys, and of values, that are held at a time
ONES = gl.constexpr(8)  # columns of the product with ones that sums the weights, the fewest an instruction takes
FIELDS = gl.constexpr(8)  # integers that describe a tile, and some to spare


class Shared(NamedTuple):
    """Rings and barriers. A `full` barrier completes when a tile has been written, an `empty` one when it has been
    read by all its readers."""

    q: tl.tensor  # (2, ROWS, D_PAD), one part for each consumer
    q_rest: tl.tensor  # (2, ROWS, D - D_PAD); where D_PAD columns are all the same as q, and never read
    k: tl.tensor  # (STAGES, TILE_N, D_PAD)
    k_rest: tl.tensor  # (STAGES, TILE_N, D - D_PAD)
    v: tl.tensor  # (STAGES, TILE_N, DV)
    run: tl.tensor  # (2, ROWS, DV) fp32: the merged chunks, later the rows on their way out; where RUN_SHARED
    ones: tl.tensor  # (ONES, BLOCK_N)
    work: tl.tensor  # (2, FIELDS) int32: descriptions of tiles
    q_full: tl.tensor
    q_empty: tl.tensor
    k_full: tl.tensor
    k_empty: tl.tensor
    v_full: tl.tensor
    v_empty: tl.tensor
    work_full: tl.tensor
    work_empty: tl.tensor
    tail: tl.tensor  # the producer's own: values that it has to look at


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """Barriers (count, 1) that complete after so many arrivals."""
    both = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(count):
        mbarrier.init(both.index(index), count=arrivals)
    return both


@gluon.jit
def work_ring():
    """Place for the descriptions of two tiles (2, FIELDS)."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [2, FIELDS], layout)


@gluon.jit
def allocate(
    q_desc, k_desc, v_desc, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """The shared memory of a program, its barriers initialised."""
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [2, ROWS, D_PAD], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, D_PAD], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, DV], v_desc.layout)
    q_rest = q
    k_rest = k
    if D > D_PAD:
        q_rest = gl.allocate_shared_memory(dtype, [2, ROWS, D - D_PAD], q_desc.layout)
        k_rest = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, D - D_PAD], k_desc.layout)
    run = q
    if RUN_SHARED:
        run_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
        run = gl.allocate_shared_memory(gl.float32, [2, ROWS, DV], run_layout)
    ones_layout: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_N), 16, rank=2)
    ones = gl.allocate_shared_memory(dtype, [ONES, BLOCK_N], ones_layout)
    ones.store(gl.full([ONES, BLOCK_N], 1.0, dtype, gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])))
    fence_async_shared()
    return Shared(
        q, q_rest, k, k_rest, v, run, ones, work_ring(), barriers(2, 1), barriers(2, 1), barriers(STAGES, 1),
        barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2), barriers(2, 1), barriers(2, 2), barriers(1, 1),
    )  # fmt: skip


@gluon.jit
def advance(stage, phase, COUNT: gl.constexpr):
    """The next place in a ring of COUNT, and the parity of the barriers there."""
    last = stage == COUNT - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def visible_keys(first, rows, q_len, kv_len, CAUSAL: gl.constexpr):
    """Keys that any of `rows` query rows from `first` on sees; 0 if they all lie past the sequence."""
    end = kv_len
    if CAUSAL:
        end = gl.maximum(gl.minimum(first + rows, q_len) + kv_len - q_len, 0)
    return gl.where(first < q_len, end, 0)
