"""The producer warp: chooses tiles, describes them to the consumers and loads what they read."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from vexact.ops.kernels.attention import rows
from vexact.ops.kernels.attention.hopper.shared import ROWS, STAGES, advance, describe, visible_keys

find_sequence = gluon.jit(rows.find_sequence.fn)
unowned_rows = gluon.jit(rows.unowned_rows.fn)


@gluon.jit
def clear_rows(target, first, num_rows, head, HEADS: gl.constexpr, WIDTH: gl.constexpr):
    """Write 0 to one head of a tile of rows of target (num_rows, HEADS, WIDTH)."""
    STEP: gl.constexpr = 256 // WIDTH
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [STEP, WIDTH // 8], [1, 1], [1, 0])
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    zeros = gl.zeros([STEP, WIDTH], target.dtype.element_ty, layout)
    for start in range(first, gl.minimum(first + 2 * ROWS, num_rows), STEP):
        row = start + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        rows = (row.to(gl.int64) * HEADS + head) * WIDTH
        gl.store(target + rows[:, None] + columns[None, :], zeros, mask=(row < num_rows)[:, None])


@gluon.jit
def clear_sums(lse, first, num_rows, head, HEADS: gl.constexpr):
    """Write -inf to one head of a tile of rows of lse (num_rows, HEADS)."""
    TILE: gl.constexpr = 2 * ROWS
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row = first + gl.arange(0, TILE, layout)
    nothing = gl.full([TILE], float("-inf"), gl.float32, layout)
    gl.store(lse + row.to(gl.int64) * HEADS + head, nothing, mask=row < num_rows)


@gluon.jit
def load_ragged(desc, row, column, tile, tail, phase, inside, HEIGHT: gl.constexpr, WIDTH: gl.constexpr):
    """Load a tile that reaches past its sequence and put zeros after the first `inside` rows, where another sequence
    begins: a weight of 0 does not hide a NaN."""
    mbarrier.expect(tail.index(0), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], tail.index(0), tile)
    mbarrier.wait(tail.index(0), phase)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [1, 1], [1, 0])
    for part in gl.static_range(HEIGHT // 8):
        some = tile.slice(part * 8, 8)
        keep = part * 8 + gl.arange(0, 8, gl.SliceLayout(1, layout)) < inside
        some.store(gl.where(keep[:, None], some.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def produce(
    shared, q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, counter, num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, TILE_N: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the heaviest of a causal sequence first, until there are no more; arguments as in `forward.py`."""
    stage, phase = 0, 1
    slot, work_phase = 0, 1
    q_phase = 1
    tail_phase = 0
    item = gl.program_id(0)
    while item < num_tiles * NUM_HEADS:
        head = item % NUM_HEADS
        tile = num_tiles - 1 - item // NUM_HEADS
        unowned = unowned_rows(cu_seqlens_q, num_sequences, tile, 2 * ROWS)
        if unowned >= 0:
            clear_rows(out, unowned, num_rows, head, NUM_HEADS, DV)
            clear_sums(lse, unowned, num_rows, head, NUM_HEADS)
        else:
            sequence, block = find_sequence(cu_seqlens_q, num_sequences, tile, 2 * ROWS)
            q_start = gl.load(cu_seqlens_q + sequence)
            q_len = gl.load(cu_seqlens_q + sequence + 1) - q_start
            first = block * 2 * ROWS
            if first < q_len:
                k_start = gl.load(cu_seqlens_k + sequence)
                kv_len = gl.load(cu_seqlens_k + sequence + 1) - k_start
                slot, work_phase = describe(
                    shared.work, shared.work_full, shared.work_empty, slot, work_phase,
                    q_start, q_len, kv_len, first, head,
                )  # fmt: skip
                for part in gl.static_range(2):
                    full = shared.q_full.index(part)
                    mbarrier.wait(shared.q_empty.index(part), q_phase)
                    mbarrier.expect(full, q_desc.block_type.nbytes)
                    row = q_start + first + part * ROWS
                    tma.async_copy_global_to_shared(q_desc, [row, head * STEP_Q], full, shared.q.index(part))
                q_phase ^= 1
                k_column = head // GROUP * STEP_K
                v_column = head // GROUP * STEP_V
                for start in range(0, visible_keys(first, 2 * ROWS, q_len, kv_len, CAUSAL), TILE_N):
                    full = shared.k_full.index(stage)
                    mbarrier.wait(shared.k_empty.index(stage), phase)
                    mbarrier.expect(full, k_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_desc, [k_start + start, k_column], full, shared.k.index(stage))
                    full = shared.v_full.index(stage)
                    values = shared.v.index(stage)
                    mbarrier.wait(shared.v_empty.index(stage), phase)
                    if start + TILE_N <= kv_len:
                        mbarrier.expect(full, v_desc.block_type.nbytes)
                        tma.async_copy_global_to_shared(v_desc, [k_start + start, v_column], full, values)
                    else:
                        row = k_start + start
                        load_ragged(v_desc, row, v_column, values, shared.tail, tail_phase, kv_len - start, TILE_N, DV)
                        tail_phase ^= 1
                        mbarrier.arrive(full, count=1)
                    stage, phase = advance(stage, phase, STAGES)
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    describe(shared.work, shared.work_full, shared.work_empty, slot, work_phase, -1, 0, 0, 0, 0)
