"""A consumer: a warp group that owns 64 of a tile's query rows and walks the keys they see."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.hopper.merged import clear_run, close_chunk, finish_rows, part_width
from vexact.ops.kernels.attention.hopper.shared import ONES, ROWS, STAGES, advance, visible_keys
from vexact.ops.kernels.attention.hopper.tiles import consume_tiles
from vexact.ops.kernels.attention.hopper.weights import (
    Weights,
    accumulator,
    add_values,
    multiply_keys,
    rescale,
    weigh_tile,
)


@gluon.jit
def start_scores(q, shared, stage, TILE_N: gl.constexpr, D: gl.constexpr, D_PAD: gl.constexpr):
    """Start the scores of the tile of keys in a stage: one sum over all columns, in order; see `score_products`."""
    s = multiply_keys(q.first, shared.k.index(stage), TILE_N)
    if D > D_PAD:
        s = warpgroup_mma(q.rest, shared.k_rest.index(stage).permute((1, 0)), s, is_async=True)
    return s


@gluon.constexpr_function
def score_products(columns, first_columns):
    """How many products `start_scores` starts."""
    return 2 if columns > first_columns else 1


@gluon.jit
def add_tile(weights, v, ones, total, acc, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, DV: gl.constexpr):
    """Add the values of one tile and wait for the sums."""
    acc, total = add_values(weights.first, v.slice(0, BLOCK_N), ones, acc, total)
    acc, total, _ = warpgroup_mma_wait(0, deps=[acc, total, weights.first])
    if TILE_N > BLOCK_N:
        acc, total = rescale(acc, total, weights.between, DV)
        acc, total = add_values(weights.second, v.slice(BLOCK_N, BLOCK_N), ones, acc, total)
        acc, total, _ = warpgroup_mma_wait(0, deps=[acc, total, weights.second])
    return total, acc


@gluon.jit
def fold_tile(
    q, shared, ones, k_stage, phase, v_stage, weights, start, limit, m, total, acc, c,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Add the values of one tile while the scores of the next, at `start`, are computed and weighed.

    m is the maximum that the next tile goes on from. The wait for the values comes in a basic block of its own, after
    the barrier of the next ones: without it the compiler puts it before the weights and they wait for each other.
    """
    v = shared.v.index(v_stage)
    if TILE_N > BLOCK_N:
        acc, total = add_values(weights.first, v.slice(0, BLOCK_N), ones, acc, total)
        mbarrier.wait(shared.k_full.index(k_stage), phase)
        s = start_scores(q, shared, k_stage, TILE_N, D, D_PAD)
        acc, total, _ = warpgroup_mma_wait(score_products(D, D_PAD), deps=[acc, total, weights.first])
        acc, total = rescale(acc, total, weights.between, DV)
        acc, total = add_values(weights.second, v.slice(BLOCK_N, BLOCK_N), ones, acc, total)
    else:
        mbarrier.wait(shared.k_full.index(k_stage), phase)
        s = start_scores(q, shared, k_stage, TILE_N, D, D_PAD)
        acc, total = add_values(weights.first, v, ones, acc, total)
    s = warpgroup_mma_wait(2, deps=[s])
    mbarrier.arrive(shared.k_empty.index(k_stage), count=1)
    dtype: gl.constexpr = v.dtype
    coming, m, alpha = weigh_tile(s, start, limit, m, c, dtype, DV, BLOCK_N, TILE_N, MASKED)
    first, second, between, m, alpha = warpgroup_mma_wait(
        2, deps=[coming.first, coming.second, coming.between, m, alpha]
    )
    mbarrier.wait(shared.v_full.index(k_stage), phase)
    acc, total, _ = warpgroup_mma_wait(0, deps=[acc, total, weights.second])
    mbarrier.arrive(shared.v_empty.index(v_stage), count=1)
    return Weights(first, second, between), m, alpha, total, acc


@gluon.jit
def skip_tiles(shared, stage, phase, count):
    """Pass over tiles that only the other consumer sees."""
    for _ in range(count):
        mbarrier.wait(shared.k_full.index(stage), phase)
        mbarrier.arrive(shared.k_empty.index(stage), count=1)
        mbarrier.wait(shared.v_full.index(stage), phase)
        mbarrier.arrive(shared.v_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def consume_tile(
    shared, tile, stage, phase, own_phase, q, ones, out, lse, run, c, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, CAUSAL: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """Attention of part PART of one tile; see `consume_tiles`."""
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    out_layout: gl.constexpr = gl.SliceLayout(1, accumulator(part_width(DV)))
    dtype: gl.constexpr = out.dtype.element_ty
    q_len, kv_len = tile.length, tile.other_length
    first = tile.first + PART * ROWS
    row = first + gl.arange(0, ROWS, row_layout)
    end = visible_keys(first, ROWS, q_len, kv_len, CAUSAL)
    limit = gl.where(row < q_len, kv_len, 0)
    full_end = kv_len // TILE_N * TILE_N
    if CAUSAL:
        shift = kv_len - q_len + 1
        limit = gl.where(row < q_len, gl.maximum(row + shift, 0), 0)
        full_end = gl.maximum(first + shift, 0) // TILE_N * TILE_N
    m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([ROWS, ONES], gl.float32, accumulator(ONES))
    acc = gl.zeros([ROWS, DV], gl.float32, accumulator(DV))
    m_run = m
    total_run = gl.zeros([ROWS], gl.float32, out_layout)
    if CHUNK > 0:  # noqa: SIM102 - a compile-time branch
        if end > CHUNK:
            clear_run(shared, run, PART, DV, RUN_SHARED)
    mbarrier.wait(shared.q_full.index(PART), own_phase)
    if end > 0:
        mbarrier.wait(shared.k_full.index(stage), phase)
        s = start_scores(q, shared, stage, TILE_N, D, D_PAD)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(shared.k_empty.index(stage), count=1)
        weights, m, alpha = weigh_tile(s, 0, limit, m, c, dtype, DV, BLOCK_N, TILE_N, True)
        mbarrier.wait(shared.v_full.index(stage), phase)
        middle = gl.maximum(gl.minimum(full_end, end), TILE_N)
        for masked in gl.static_range(2):
            low = TILE_N if masked == 0 else middle
            high = middle if masked == 0 else end
            for start in range(low, high, TILE_N):
                v_stage = stage
                stage, phase = advance(stage, phase, STAGES)
                m_before = m
                if CHUNK > 0:
                    fresh = start % CHUNK == 0
                    m_before = gl.where(fresh, float("-inf"), m)
                weights, m_next, alpha, total, acc = fold_tile(
                    q, shared, ones, stage, phase, v_stage, weights, start, limit, m_before, total, acc, c,
                    D, DV, D_PAD, BLOCK_N, TILE_N, masked == 1,
                )  # fmt: skip
                if CHUNK > 0:  # noqa: SIM102
                    if fresh:
                        m_both, total_run = close_chunk(
                            shared, run, m_run, total_run, m, total, acc, c, PART, DV, RUN_SHARED
                        )
                        m_run = gl.convert_layout(m_both, row_layout, assert_trivial=True)
                        acc = gl.zeros([ROWS, DV], gl.float32, accumulator(DV))
                        total = gl.zeros([ROWS, ONES], gl.float32, accumulator(ONES))
                m = m_next
                acc, total = rescale(acc, total, alpha, DV)
        total, acc = add_tile(weights, shared.v.index(stage), ones, total, acc, BLOCK_N, TILE_N, DV)
        mbarrier.arrive(shared.v_empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    mbarrier.arrive(shared.q_empty.index(PART), count=1)
    own_phase ^= 1
    tile_end = visible_keys(tile.first, 2 * ROWS, q_len, kv_len, CAUSAL)
    stage, phase = skip_tiles(shared, stage, phase, gl.cdiv(tile_end, TILE_N) - gl.cdiv(end, TILE_N))
    finish_rows(
        out, lse, shared, run, end > CHUNK, m_run, total_run, m, total, acc, c, tile.start, first, tile.head, q_len,
        PART, NUM_HEADS, CHUNK, DV, RUN_SHARED,
    )  # fmt: skip
    return stage, phase, own_phase


@gluon.jit
def consume(
    shared, out, lse, run, c, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, CAUSAL: gl.constexpr, RUN_SHARED: gl.constexpr,
):  # fmt: skip
    """Attention of part PART (0 or 1) of every tile that the producer draws; arguments as in `forward.py`."""
    q = Columns(shared.q.index(PART), shared.q_rest.index(PART))
    ones = shared.ones.permute((1, 0))
    consume_tiles(
        shared, consume_tile,
        (q, ones, out, lse, run, c, PART, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, D, DV, D_PAD, CAUSAL, RUN_SHARED),
    )  # fmt: skip
