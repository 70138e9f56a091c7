"""The warp-specialised dK and dV: a tile is 128 keys, 64 for each consumer, which walks the query rows that see them.

The sums are those of `attention/backward.py`: over the query heads of the group one after another, over rows in order.
Rows that the mask hides, or that are not there, add exact zeros, so it decides nothing where a walk begins.
"""

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
    work_ring,
)
from vexact.ops.kernels.attention.hopper.weights import accumulator, as_left_operand, store_gradient


class KeysShared(NamedTuple):
    """Tiles and barriers; see `shared.Shared`. The producer warp stores lse and delta itself, which is one more arrival
    at `full`."""

    k: tl.tensor  # (2, ROWS, D)
    v: tl.tensor  # (2, ROWS, DV)
    q: tl.tensor  # (STAGES, ROWS, D)
    do: tl.tensor  # (STAGES, ROWS, DV)
    lse: tl.tensor  # (STAGES, ROWS) fp32
    delta: tl.tensor
    work: tl.tensor
    own_full: tl.tensor
    own_empty: tl.tensor
    full: tl.tensor
    empty: tl.tensor
    work_full: tl.tensor
    work_empty: tl.tensor
    tail: tl.tensor


@gluon.jit
def first_row(first, q_len, kv_len, CAUSAL: gl.constexpr):
    """Where the walk over query rows begins for the keys from `first` on."""
    begin = 0
    if CAUSAL:
        begin = gl.maximum(first - (kv_len - q_len), 0) // ROWS * ROWS
    return begin


@gluon.jit
def produce(
    shared, q_desc, k_desc, v_desc, do_desc, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter,
    num_rows, num_keys, num_sequences, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr,
    STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the first keys of a sequence first: most rows see them."""
    stage, phase = 0, 1
    slot, work_phase = 0, 1
    own_phase = 1
    tail_phase = 0
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lane = gl.arange(0, ROWS, layout)
    item = gl.program_id(0)
    while item < num_tiles * KV_HEADS:
        kv_head = item % KV_HEADS
        tile = item // KV_HEADS
        unowned = unowned_rows(cu_seqlens_k, num_sequences, tile, 2 * ROWS)
        if unowned >= 0:
            clear_rows(dk, unowned, num_keys, kv_head, KV_HEADS, D)
            clear_rows(dv, unowned, num_keys, kv_head, KV_HEADS, DV)
        else:
            sequence, block = find_sequence(cu_seqlens_k, num_sequences, tile, 2 * ROWS)
            k_start = gl.load(cu_seqlens_k + sequence)
            kv_len = gl.load(cu_seqlens_k + sequence + 1) - k_start
            first = block * 2 * ROWS
            if first < kv_len:
                q_start = gl.load(cu_seqlens_q + sequence)
                q_len = gl.load(cu_seqlens_q + sequence + 1) - q_start
                slot, work_phase = describe(
                    shared.work, shared.work_full, shared.work_empty, slot, work_phase,
                    k_start, kv_len, q_len, first, kv_head,
                )  # fmt: skip
                for part in gl.static_range(2):
                    own = shared.own_full.index(part)
                    row = k_start + first + part * ROWS
                    mbarrier.wait(shared.own_empty.index(part), own_phase)
                    mbarrier.expect(own, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(k_desc, [row, kv_head * STEP_K], own, shared.k.index(part))
                    tma.async_copy_global_to_shared(v_desc, [row, kv_head * STEP_V], own, shared.v.index(part))
                own_phase ^= 1
                begin = first_row(first, q_len, kv_len, CAUSAL)
                for member in range(GROUP):
                    head = kv_head * GROUP + member
                    statistics = head.to(gl.int64) * num_rows + q_start
                    for start in range(begin, q_len, ROWS):
                        inside = start + lane < q_len
                        row_lse = gl.load(lse + statistics + start + lane, mask=inside, other=float("inf"))
                        row_delta = gl.load(delta + statistics + start + lane, mask=inside, other=0.0)
                        full = shared.full.index(stage)
                        row = q_start + start
                        q_column = head * STEP_Q
                        do_column = head * DV
                        mbarrier.wait(shared.empty.index(stage), phase)
                        if start + ROWS <= q_len:
                            mbarrier.expect(full, q_desc.block_type.nbytes + do_desc.block_type.nbytes)
                            tma.async_copy_global_to_shared(q_desc, [row, q_column], full, shared.q.index(stage))
                            tma.async_copy_global_to_shared(do_desc, [row, do_column], full, shared.do.index(stage))
                        else:
                            rest = q_len - start
                            load_ragged(
                                q_desc, row, q_column, shared.q.index(stage), shared.tail, tail_phase, rest, ROWS, D
                            )
                            load_ragged(
                                do_desc, row, do_column, shared.do.index(stage), shared.tail, tail_phase ^ 1, rest,
                                ROWS, DV,
                            )  # fmt: skip
                            mbarrier.arrive(full, count=1)
                        shared.lse.index(stage).store(row_lse)
                        shared.delta.index(stage).store(row_delta)
                        mbarrier.arrive(full, count=1)
                        stage, phase = advance(stage, phase, STAGES)
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
    describe(shared.work, shared.work_full, shared.work_empty, slot, work_phase, -1, 0, 0, 0, 0)


@gluon.jit
def consume(
    shared, dk, dv, c, scale, PART: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART (0 or 1) of every tile."""
    layout: gl.constexpr = accumulator(ROWS)
    dtype: gl.constexpr = dk.dtype.element_ty
    k = shared.k.index(PART)
    v = shared.v.index(PART)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, layout)
    stage, phase = 0, 0
    slot, work_phase = 0, 0
    own_phase = 0
    more = True
    while more:
        k_start, kv_len, q_len, tile_first, kv_head = read_description(
            shared.work, shared.work_full, shared.work_empty, slot, work_phase
        )
        slot, work_phase = advance(slot, work_phase, 2)
        more = k_start >= 0
        if more:
            first = tile_first + PART * ROWS
            keys = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            begin = first_row(tile_first, q_len, kv_len, CAUSAL)
            shift = kv_len - q_len
            dk_acc = gl.zeros([ROWS, D], gl.float32, accumulator(D))
            dv_acc = gl.zeros([ROWS, DV], gl.float32, accumulator(DV))
            mbarrier.wait(shared.own_full.index(PART), own_phase)
            own_phase ^= 1
            for _member in range(GROUP):
                for start in range(begin, q_len, ROWS):
                    q = shared.q.index(stage)
                    do = shared.do.index(stage)
                    mbarrier.wait(shared.full.index(stage), phase)
                    s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
                    dp = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
                    row_lse = shared.lse.index(stage).load(gl.SliceLayout(0, layout))
                    s = warpgroup_mma_wait(1, deps=[s])
                    p = gl.exp2(gl.fma(s, c, (-row_lse)[None, :]))
                    if CAUSAL:
                        rows = start + gl.arange(0, ROWS, gl.SliceLayout(0, layout))
                        p = gl.where(keys[:, None] <= rows[None, :] + shift, p, 0.0)
                    weights = as_left_operand(p.to(dtype), DV)
                    dv_next = warpgroup_mma(weights, do, dv_acc, is_async=True)
                    row_delta = shared.delta.index(stage).load(gl.SliceLayout(0, layout))
                    dp = warpgroup_mma_wait(1, deps=[dp])
                    ds = as_left_operand((p * (dp - row_delta[None, :])).to(dtype), D)
                    dk_next = warpgroup_mma(ds, q, dk_acc, is_async=True)
                    dv_acc, dk_acc, _, _ = warpgroup_mma_wait(0, deps=[dv_next, dk_next, weights, ds])
                    mbarrier.arrive(shared.empty.index(stage), count=1)
                    stage, phase = advance(stage, phase, STAGES)
            mbarrier.arrive(shared.own_empty.index(PART), count=1)
            store_gradient(dk, dk_acc * scale, k_start, first, kv_head, kv_len, KV_HEADS, D)
            store_gradient(dv, dv_acc, k_start, first, kv_head, kv_len, KV_HEADS, DV)


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "num_sequences", "num_tiles"])
def keys_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter, c, scale,
    num_rows, num_keys, num_sequences, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr,
    STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk (Tk, KV_HEADS, D) and dv (Tk, KV_HEADS, DV), contiguous, of all tiles of 128 keys.

    q_desc, k_desc, v_desc, do_desc: (rows, columns) of all heads in boxes of 64 rows, STEP columns from head to head,
    DV for do_desc; lse, delta (heads, num_rows) fp32 of `prepare_kernel`; counter (1,) int32, 0 at the start.
    """
    dtype: gl.constexpr = q_desc.dtype
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = KeysShared(
        gl.allocate_shared_memory(dtype, [2, ROWS, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [2, ROWS, DV], v_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, DV], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], vector),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], vector),
        work_ring(), barriers(2, 1), barriers(2, 1), barriers(STAGES, 2), barriers(STAGES, 2),
        barriers(2, 1), barriers(2, 2), barriers(1, 1),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (shared, dk, dv, c, scale, 0, KV_HEADS, GROUP, D, DV, CAUSAL, STAGES)),
            (consume, (shared, dk, dv, c, scale, 1, KV_HEADS, GROUP, D, DV, CAUSAL, STAGES)),
            (
                produce,
                (
                    shared, q_desc, k_desc, v_desc, do_desc, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter,
                    num_rows, num_keys, num_sequences, num_tiles,
                    KV_HEADS, GROUP, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
