"""The warp-specialised dK and dV: a tile is 128 keys, 64 for each consumer, which walks the query rows that see them.

The sums are those of `attention/backward.py`: over the query heads of the group one after another, over rows in order.
Rows that the mask hides, or that are not there, add exact zeros, so it decides nothing where a walk begins.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.hopper.backward.keys_consumer import consume, first_row
from vexact.ops.kernels.attention.hopper.loading import (
    Pair,
    allocate_pair,
    clear_rows,
    find_tile,
    load_own,
    load_pair,
    rest_width,
)
from vexact.ops.kernels.attention.hopper.shared import ROWS, advance, barriers, work_ring
from vexact.ops.kernels.attention.hopper.tiles import Places, describe, produce_tiles


class KeysShared(NamedTuple):
    """Tiles and barriers; see `shared.Shared`. The producer warp stores the statistics of rows itself, which is one
    more arrival at `full`."""

    own: Pair  # keys (2, ROWS, D) and values (2, ROWS, DV)
    other: Pair  # queries (STAGES, BLOCK, D) and gradients of the output (STAGES, BLOCK, DV)
    minus_lse: tl.tensor  # (STAGES, BLOCK) fp32
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
def clear_tile(first, kv_head, dk, dv, num_keys, KV_HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr):
    clear_rows(dk, first, num_keys, kv_head, KV_HEADS, D)
    clear_rows(dv, first, num_keys, kv_head, KV_HEADS, DV)


@gluon.jit
def produce_tile(
    shared, tile, kv_head, places, lane, own, other, lse, delta, cu_seqlens_q, cu_seqlens_k, num_rows, num_sequences,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Describe one tile and load its keys and values, and the rows that see them; see `produce_tiles`."""
    stage, phase, slot, work_phase, own_phase, tail_phase = places
    k_start, kv_len, q_start, q_len, first = find_tile(cu_seqlens_k, cu_seqlens_q, num_sequences, tile)
    if first < kv_len:
        slot, work_phase = describe(
            shared.work, shared.work_full, shared.work_empty, slot, work_phase, k_start, kv_len, q_len, first, kv_head
        )
        load_own(
            own, k_start + first, kv_head * STEP_K, kv_head * STEP_V, shared.own, shared.own_full,
            shared.own_empty, own_phase, D, DV,
        )  # fmt: skip
        own_phase ^= 1
        for member in range(GROUP):
            head = kv_head * GROUP + member
            statistics = head.to(gl.int64) * num_rows + q_start
            for start in range(first_row(first, q_len, kv_len, BLOCK, CAUSAL), q_len, BLOCK):
                inside = start + lane < q_len
                row_lse = gl.load(lse + statistics + start + lane, mask=inside, other=float("inf"))
                row_delta = gl.load(delta + statistics + start + lane, mask=inside, other=0.0)
                full = shared.full.index(stage)
                mbarrier.wait(shared.empty.index(stage), phase)
                tail_phase = load_pair(
                    other, q_start + start, head * STEP_Q, head * DV, shared.other, stage, full, shared.tail,
                    tail_phase, q_len - start, BLOCK, D, DV,
                )  # fmt: skip
                shared.minus_lse.index(stage).store(-row_lse)
                shared.delta.index(stage).store(row_delta)
                mbarrier.arrive(full, count=1)
                stage, phase = advance(stage, phase, STAGES)
    return Places(stage, phase, slot, work_phase, own_phase, tail_phase)


@gluon.jit
def produce(
    shared, own, other, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter,
    num_rows, num_keys, num_sequences, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the first keys of a sequence first: most rows see them. own, other: descriptors, as the tiles of
    `shared`."""
    lane = gl.arange(0, BLOCK, gl.BlockedLayout([BLOCK // 32], [32], [1], [0]))
    produce_tiles(
        shared, clear_tile, (dk, dv, num_keys, KV_HEADS, D, DV), produce_tile,
        (
            lane, own, other, lse, delta, cu_seqlens_q, cu_seqlens_k, num_rows, num_sequences,
            GROUP, BLOCK, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
        ),
        cu_seqlens_k, counter, num_sequences, num_tiles, KV_HEADS, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "num_keys", "num_sequences", "num_tiles"])
def keys_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, do_desc, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter,
    c, scale, num_rows, num_keys, num_sequences, num_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk (Tk, KV_HEADS, D) and dv (Tk, KV_HEADS, DV), contiguous, of all tiles of 128 keys.

    q_desc, k_desc, v_desc, do_desc: (rows, columns) of all heads in boxes of 64 rows (BLOCK of those that are walked),
    STEP columns from head to head, DV for do_desc. Where D is no power of two, q_desc and k_desc hold the first
    columns of a head and the rest descriptors the others; else these are never read. lse, delta (heads, num_rows) fp32
    of `prepare_kernel`; counter (1,) int32, 0 at the start. AHEAD changes no bit, nor do BLOCK and STAGES.
    """
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = KeysShared(
        allocate_pair(k_desc, k_rest_desc, v_desc, 2, ROWS, D, DV),
        allocate_pair(q_desc, q_rest_desc, do_desc, STAGES, BLOCK, D, DV),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], vector),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], vector),
        work_ring(), barriers(2, 1), barriers(2, 1), barriers(STAGES, 2), barriers(STAGES, 2),
        barriers(2, 1), barriers(2, 2), barriers(1, 1),
    )  # fmt: skip
    own = Pair(Columns(k_desc, k_rest_desc if rest_width(D) > 0 else k_desc), v_desc)
    other = Pair(Columns(q_desc, q_rest_desc if rest_width(D) > 0 else q_desc), do_desc)
    gl.warp_specialize(
        [
            (consume, (shared, dk, dv, c, scale, 0, KV_HEADS, GROUP, BLOCK, D, DV, CAUSAL, STAGES, AHEAD)),
            (consume, (shared, dk, dv, c, scale, 1, KV_HEADS, GROUP, BLOCK, D, DV, CAUSAL, STAGES, AHEAD)),
            (
                produce,
                (
                    shared, own, other, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter,
                    num_rows, num_keys, num_sequences, num_tiles,
                    KV_HEADS, GROUP, BLOCK, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
