"""The warp-specialised dQ: a tile is 128 query rows, 64 for each consumer, which walks the keys they see in order."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from vexact.ops.kernels.attention.hopper.producer import clear_rows, find_sequence, load_ragged, unowned_rows
from vexact.ops.kernels.attention.hopper.shared import (
    ROWS,
    advance,
    barriers,
    describe,
    read_description,
    visible_keys,
    work_ring,
)
from vexact.ops.kernels.attention.hopper.weights import accumulator, as_left_operand, store_gradient


class QueriesShared(NamedTuple):
    """Tiles and barriers; see `shared.Shared`."""

    q: tl.tensor  # (2, ROWS, D)
    do: tl.tensor  # (2, ROWS, DV)
    k: tl.tensor  # (STAGES, BLOCK_N, D)
    v: tl.tensor  # (STAGES, BLOCK_N, DV)
    work: tl.tensor
    own_full: tl.tensor
    own_empty: tl.tensor
    full: tl.tensor
    empty: tl.tensor
    work_full: tl.tensor
    work_empty: tl.tensor
    tail: tl.tensor


@gluon.jit
def produce(
    shared, q_desc, k_desc, v_desc, do_desc, dq, cu_seqlens_q, cu_seqlens_k, counter,
    num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the heaviest of a causal sequence first."""
    stage, phase = 0, 1
    slot, work_phase = 0, 1
    own_phase = 1
    tail_phase = 0
    item = gl.program_id(0)
    while item < num_tiles * NUM_HEADS:
        head = item % NUM_HEADS
        tile = num_tiles - 1 - item // NUM_HEADS
        unowned = unowned_rows(cu_seqlens_q, num_sequences, tile, 2 * ROWS)
        if unowned >= 0:
            clear_rows(dq, unowned, num_rows, head, NUM_HEADS, D)
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
                    own = shared.own_full.index(part)
                    row = q_start + first + part * ROWS
                    mbarrier.wait(shared.own_empty.index(part), own_phase)
                    mbarrier.expect(own, q_desc.block_type.nbytes + do_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(q_desc, [row, head * STEP_Q], own, shared.q.index(part))
                    tma.async_copy_global_to_shared(do_desc, [row, head * DV], own, shared.do.index(part))
                own_phase ^= 1
                k_column = head // GROUP * STEP_K
                v_column = head // GROUP * STEP_V
                for start in range(0, visible_keys(first, 2 * ROWS, q_len, kv_len, CAUSAL), BLOCK_N):
                    full = shared.full.index(stage)
                    row = k_start + start
                    mbarrier.wait(shared.empty.index(stage), phase)
                    if start + BLOCK_N <= kv_len:
                        mbarrier.expect(full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                        tma.async_copy_global_to_shared(k_desc, [row, k_column], full, shared.k.index(stage))
                        tma.async_copy_global_to_shared(v_desc, [row, v_column], full, shared.v.index(stage))
                    else:
                        rest = kv_len - start
                        load_ragged(
                            k_desc, row, k_column, shared.k.index(stage), shared.tail, tail_phase, rest, BLOCK_N, D
                        )
                        load_ragged(
                            v_desc, row, v_column, shared.v.index(stage), shared.tail, tail_phase ^ 1, rest,
                            BLOCK_N, DV,
                        )  # fmt: skip
                        mbarrier.arrive(full, count=1)
                    stage, phase = advance(stage, phase, STAGES)
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    describe(shared.work, shared.work_full, shared.work_empty, slot, work_phase, -1, 0, 0, 0, 0)


@gluon.jit
def consume(
    shared, dq, lse, delta, c, scale, num_rows, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART (0 or 1) of every tile."""
    layout: gl.constexpr = accumulator(BLOCK_N)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    dtype: gl.constexpr = dq.dtype.element_ty
    q = shared.q.index(PART)
    do = shared.do.index(PART)
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    stage, phase = 0, 0
    slot, work_phase = 0, 0
    own_phase = 0
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
            limit = gl.where(row < q_len, kv_len, 0)
            if CAUSAL:
                limit = gl.where(row < q_len, gl.maximum(row + kv_len - q_len + 1, 0), 0)
            statistics = head.to(gl.int64) * num_rows + q_start + row
            row_lse = gl.load(lse + statistics, mask=row < q_len, other=float("inf"))
            row_delta = gl.load(delta + statistics, mask=row < q_len, other=0.0)
            acc = gl.zeros([ROWS, D], gl.float32, accumulator(D))
            end = visible_keys(first, ROWS, q_len, kv_len, CAUSAL)
            tile_end = visible_keys(tile_first, 2 * ROWS, q_len, kv_len, CAUSAL)
            mbarrier.wait(shared.own_full.index(PART), own_phase)
            own_phase ^= 1
            for start in range(0, end, BLOCK_N):
                k = shared.k.index(stage)
                mbarrier.wait(shared.full.index(stage), phase)
                s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
                dp = warpgroup_mma(do, shared.v.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.exp2(gl.fma(s, c, (-row_lse)[:, None]))
                keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
                p = gl.where(keys[None, :] < limit[:, None], p, 0.0)
                dp = warpgroup_mma_wait(0, deps=[dp])
                ds = as_left_operand((p * (dp - row_delta[:, None])).to(dtype), D)
                acc_next = warpgroup_mma(ds, k, acc, is_async=True)
                acc, _ = warpgroup_mma_wait(0, deps=[acc_next, ds])
                mbarrier.arrive(shared.empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
            mbarrier.arrive(shared.own_empty.index(PART), count=1)
            for _skipped in range(gl.cdiv(tile_end, BLOCK_N) - gl.cdiv(end, BLOCK_N)):
                mbarrier.wait(shared.full.index(stage), phase)
                mbarrier.arrive(shared.empty.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)
            store_gradient(dq, acc * scale, q_start, first, head, q_len, NUM_HEADS, D)


@gluon.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles"])
def queries_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, counter, c, scale,
    num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq (T, NUM_HEADS, D), contiguous, of all tiles of 128 query rows; arguments as those of `keys_kernel`, k_desc and
    v_desc in boxes of BLOCK_N rows."""
    dtype: gl.constexpr = q_desc.dtype
    shared = QueriesShared(
        gl.allocate_shared_memory(dtype, [2, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [2, ROWS, DV], do_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DV], v_desc.layout),
        work_ring(), barriers(2, 1), barriers(2, 1), barriers(STAGES, 1), barriers(STAGES, 2),
        barriers(2, 1), barriers(2, 2), barriers(1, 1),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (shared, dq, lse, delta, c, scale, num_rows, 0, NUM_HEADS, BLOCK_N, D, CAUSAL, STAGES)),
            (consume, (shared, dq, lse, delta, c, scale, num_rows, 1, NUM_HEADS, BLOCK_N, D, CAUSAL, STAGES)),
            (
                produce,
                (
                    shared, q_desc, k_desc, v_desc, do_desc, dq, cu_seqlens_q, cu_seqlens_k, counter,
                    num_rows, num_sequences, num_tiles,
                    NUM_HEADS, GROUP, BLOCK_N, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
