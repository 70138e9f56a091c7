"""The producer warp: chooses tiles, describes them to the consumers and loads what they read."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vexact.ops.kernels.attention.hopper.boxes import box_height, load_boxes, load_values, tile_rows
from vexact.ops.kernels.attention.hopper.loading import clear_rows
from vexact.ops.kernels.attention.hopper.shared import ROWS, STAGES, advance, find_sequence, visible_keys
from vexact.ops.kernels.attention.hopper.tiles import Places, describe, produce_tiles


@gluon.jit
def clear_sums(lse, first, num_rows, head, HEADS: gl.constexpr):
    """Write -inf to one head of a tile of rows of lse (num_rows, HEADS)."""
    TILE: gl.constexpr = 2 * ROWS
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row = first + gl.arange(0, TILE, layout)
    nothing = gl.full([TILE], float("-inf"), gl.float32, layout)
    gl.store(lse + row.to(gl.int64) * HEADS + head, nothing, mask=row < num_rows)


@gluon.jit
def clear_tile(first, head, out, lse, num_rows, HEADS: gl.constexpr, DV: gl.constexpr):
    clear_rows(out, first, num_rows, head, HEADS, DV)
    clear_sums(lse, first, num_rows, head, HEADS)


@gluon.jit
def produce_tile(
    shared, tile, head, places, q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, cu_seqlens_q, kv_lengths, table,
    num_sequences, stride_table, skip_up_to, GROUP: gl.constexpr, TILE_N: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr,
):  # fmt: skip
    """Describe one tile and load its queries, and the keys and values that they see; see `produce_tiles`."""
    TWO: gl.constexpr = D > D_PAD
    BOXES: gl.constexpr = TILE_N // box_height(PAGE_SIZE, TILE_N)
    Q_BYTES: gl.constexpr = q_desc.block_type.nbytes + (q_rest_desc.block_type.nbytes if TWO else 0)
    K_BYTES: gl.constexpr = BOXES * (k_desc.block_type.nbytes + (k_rest_desc.block_type.nbytes if TWO else 0))
    stage, phase, slot, work_phase, own_phase, tail_phase = places
    sequence, block = find_sequence(cu_seqlens_q, num_sequences, tile, 2 * ROWS)
    q_start = gl.load(cu_seqlens_q + sequence)
    q_len = gl.load(cu_seqlens_q + sequence + 1) - q_start
    first = block * 2 * ROWS
    if (first < q_len) & (q_len > skip_up_to):
        k_start = gl.load(kv_lengths + sequence)
        kv_len = k_start
        pages = table
        if PAGE_SIZE == 0:
            kv_len = gl.load(kv_lengths + sequence + 1) - k_start
        else:
            pages += gl.cast(sequence, gl.int64) * stride_table
        slot, work_phase = describe(
            shared.work, shared.work_full, shared.work_empty, slot, work_phase,
            q_start, q_len, kv_len, first, head,
        )  # fmt: skip
        for part in gl.static_range(2):
            full = shared.q_full.index(part)
            mbarrier.wait(shared.q_empty.index(part), own_phase)
            mbarrier.expect(full, Q_BYTES)
            row = q_start + first + part * ROWS
            column = head * STEP_Q
            tma.async_copy_global_to_shared(q_desc, [row, column], full, shared.q.index(part))
            if TWO:
                q_rest = shared.q_rest.index(part)
                tma.async_copy_global_to_shared(q_rest_desc, [row, column + D_PAD], full, q_rest)
        own_phase ^= 1
        k_column = head // GROUP * STEP_K
        v_column = head // GROUP * STEP_V
        coming = tile_rows(pages, k_start, 0, kv_len, TILE_N, PAGE_SIZE)
        for start in range(0, visible_keys(first, 2 * ROWS, q_len, kv_len, CAUSAL), TILE_N):
            rows = coming
            coming = tile_rows(pages, k_start, start + TILE_N, kv_len, TILE_N, PAGE_SIZE)
            full = shared.k_full.index(stage)
            mbarrier.wait(shared.k_empty.index(stage), phase)
            mbarrier.expect(full, K_BYTES)
            load_boxes(k_desc, rows, k_column, full, shared.k.index(stage), TILE_N, PAGE_SIZE)
            if TWO:
                k_rest = shared.k_rest.index(stage)
                load_boxes(k_rest_desc, rows, k_column + D_PAD, full, k_rest, TILE_N, PAGE_SIZE)
            mbarrier.wait(shared.v_empty.index(stage), phase)
            tail_phase = load_values(
                v_desc, rows, v_column, shared.v_full.index(stage), shared.v.index(stage),
                shared.tail, tail_phase, kv_len - start, TILE_N, DV, PAGE_SIZE,
            )  # fmt: skip
            stage, phase = advance(stage, phase, STAGES)
    return Places(stage, phase, slot, work_phase, own_phase, tail_phase)


@gluon.jit
def produce(
    shared, q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, out, lse, cu_seqlens_q, kv_lengths, table, counter,
    num_rows, num_sequences, num_tiles, stride_table, skip_up_to,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, TILE_N: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, D_PAD: gl.constexpr, PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the heaviest of a causal sequence first; arguments as in `forward.py`."""
    produce_tiles(
        shared, clear_tile, (out, lse, num_rows, NUM_HEADS, DV), produce_tile,
        (
            q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, cu_seqlens_q, kv_lengths, table,
            num_sequences, stride_table, skip_up_to,
            GROUP, TILE_N, D, DV, D_PAD, PAGE_SIZE, CAUSAL, STEP_Q, STEP_K, STEP_V,
        ),
        cu_seqlens_q, counter, num_sequences, num_tiles, NUM_HEADS, True,
    )  # fmt: skip
