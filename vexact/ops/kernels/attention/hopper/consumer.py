"""A consumer: a warp group that owns 64 of a tile's query rows and walks the keys they see."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from vexact.ops.kernels.attention.hopper.shared import (
    ONES,
    ROWS,
    STAGES,
    advance,
    read_description,
    visible_keys,
)
from vexact.ops.kernels.attention.hopper.weights import (
    Weights,
    accumulator,
    add_values,
    finish,
    merge_states,
    multiply_keys,
    rescale,
    row_sums,
    weigh_tile,
)


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
    DV: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add the values of one tile while the scores of the next, at `start`, are computed and weighed.

    m is the maximum that the next tile goes on from. The wait for the values comes in a basic block of its own, after
    the barrier of the next ones: without it the compiler puts it before the weights and they wait for each other.
    """
    v = shared.v.index(v_stage)
    k = shared.k.index(k_stage)
    if TILE_N > BLOCK_N:
        acc, total = add_values(weights.first, v.slice(0, BLOCK_N), ones, acc, total)
        mbarrier.wait(shared.k_full.index(k_stage), phase)
        s = multiply_keys(q, k, TILE_N)
        acc, total, _ = warpgroup_mma_wait(1, deps=[acc, total, weights.first])
        acc, total = rescale(acc, total, weights.between, DV)
        acc, total = add_values(weights.second, v.slice(BLOCK_N, BLOCK_N), ones, acc, total)
    else:
        mbarrier.wait(shared.k_full.index(k_stage), phase)
        s = multiply_keys(q, k, TILE_N)
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
def merge_run(run, m_run, total_run, m, total, acc, c, BLOCK_N: gl.constexpr, DV: gl.constexpr):
    """(m, total, acc) of the merged chunks, whose sums are in `run`, and the one that has just been closed."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(DV))
    return merge_states(
        gl.convert_layout(m_run, layout, assert_trivial=True), total_run, run.load(accumulator(DV)),
        gl.convert_layout(m, layout, assert_trivial=True), row_sums(total, DV), acc, c,
    )  # fmt: skip


@gluon.jit
def store_rows(
    out, lse, staging, value, row_lse, q_start, first, head, q_len, NUM_HEADS: gl.constexpr, DV: gl.constexpr
):
    """Write the rows that lie in the sequence to out (T, NUM_HEADS, DV) and lse (T, NUM_HEADS)."""
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(DV)))
    gl.store(lse + (q_start + row).to(gl.int64) * NUM_HEADS + head, row_lse, mask=row < q_len)
    staging.store(value.to(out.dtype.element_ty))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    flat = (q_start + row).to(gl.int64) * NUM_HEADS + head
    columns = gl.arange(0, DV, gl.SliceLayout(0, layout))
    gl.store(out + flat[:, None] * DV + columns[None, :], staging.load(layout), mask=(row < q_len)[:, None])


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
def consume(
    shared, out, lse, c, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    DV: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Attention of part PART (0 or 1) of every tile that the producer draws; arguments as in `forward.py`."""
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_N))
    out_layout: gl.constexpr = gl.SliceLayout(1, accumulator(DV))
    dtype: gl.constexpr = out.dtype.element_ty
    q = shared.q.index(PART)
    run = shared.run.index(PART)
    ones = shared.ones.permute((1, 0))
    staging = run._reinterpret(dtype, [ROWS, DV], gl.NVMMASharedLayout(128, 16, rank=2))
    stage, phase = 0, 0
    slot, work_phase = 0, 0
    q_phase = 0
    more = True
    while more:
        q_start, q_len, kv_len, tile_first, head = read_description(
            shared.work, shared.work_full, shared.work_empty, slot, work_phase
        )
        slot, work_phase = advance(slot, work_phase, 2)
        more = q_start >= 0
        if more:
            first = tile_first + PART * ROWS
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
                    run.store(acc)
            mbarrier.wait(shared.q_full.index(PART), q_phase)
            if end > 0:
                mbarrier.wait(shared.k_full.index(stage), phase)
                s = multiply_keys(q, shared.k.index(stage), TILE_N)
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
                            DV, BLOCK_N, TILE_N, masked == 1,
                        )  # fmt: skip
                        if CHUNK > 0:  # noqa: SIM102
                            if fresh:
                                m_both, total_run, merged = merge_run(
                                    run, m_run, total_run, m, total, acc, c, BLOCK_N, DV
                                )
                                run.store(merged)
                                m_run = gl.convert_layout(m_both, row_layout, assert_trivial=True)
                                acc = gl.zeros([ROWS, DV], gl.float32, accumulator(DV))
                                total = gl.zeros([ROWS, ONES], gl.float32, accumulator(ONES))
                        m = m_next
                        acc, total = rescale(acc, total, alpha, DV)
                total, acc = add_tile(weights, shared.v.index(stage), ones, total, acc, BLOCK_N, TILE_N, DV)
                mbarrier.arrive(shared.v_empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
            mbarrier.arrive(shared.q_empty.index(PART), count=1)
            q_phase ^= 1
            tile_end = visible_keys(tile_first, 2 * ROWS, q_len, kv_len, CAUSAL)
            stage, phase = skip_tiles(shared, stage, phase, gl.cdiv(tile_end, TILE_N) - gl.cdiv(end, TILE_N))
            m_last = gl.convert_layout(m, out_layout, assert_trivial=True)
            total_last = row_sums(total, DV)
            if CHUNK > 0:  # noqa: SIM102 - a compile-time branch
                if end > CHUNK:
                    m_last, total_last, acc = merge_run(run, m_run, total_run, m, total, acc, c, BLOCK_N, DV)
            value, row_lse = finish(m_last, total_last, acc, c)
            store_rows(out, lse, staging, value, row_lse, q_start, first, head, q_len, NUM_HEADS, DV)
