"""The warp-specialised dQ: a tile is 128 query rows, 64 for each consumer, which walks the keys they see in order."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.hopper.backward.queries_consumer import consume
from vexact.ops.kernels.attention.hopper.loading import (
    Pair,
    allocate_pair,
    clear_rows,
    find_tile,
    load_own,
    load_pair,
    rest_width,
)
from vexact.ops.kernels.attention.hopper.shared import ROWS, advance, barriers, visible_keys, work_ring
from vexact.ops.kernels.attention.hopper.tiles import Places, describe, produce_tiles


class QueriesShared(NamedTuple):
    """Tiles and barriers; see `shared.Shared`."""

    own: Pair  # queries (2, ROWS, D) and gradients of the output (2, ROWS, DV)
    other: Pair  # keys (STAGES, BLOCK, D) and values (STAGES, BLOCK, DV)
    work: tl.tensor
    own_full: tl.tensor
    own_empty: tl.tensor
    full: tl.tensor
    empty: tl.tensor
    work_full: tl.tensor
    work_empty: tl.tensor
    tail: tl.tensor


@gluon.jit
def clear_tile(first, head, dq, num_rows, HEADS: gl.constexpr, D: gl.constexpr):
    clear_rows(dq, first, num_rows, head, HEADS, D)


@gluon.jit
def produce_tile(
    shared, tile, head, places, own, other, cu_seqlens_q, cu_seqlens_k, num_sequences,
    GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Describe one tile and load its rows, and the keys and values that they see; see `produce_tiles`."""
    stage, phase, slot, work_phase, own_phase, tail_phase = places
    q_start, q_len, k_start, kv_len, first = find_tile(cu_seqlens_q, cu_seqlens_k, num_sequences, tile)
    if first < q_len:
        slot, work_phase = describe(
            shared.work, shared.work_full, shared.work_empty, slot, work_phase, q_start, q_len, kv_len, first, head
        )
        load_own(
            own, q_start + first, head * STEP_Q, head * DV, shared.own, shared.own_full, shared.own_empty,
            own_phase, D, DV,
        )  # fmt: skip
        own_phase ^= 1
        for start in range(0, visible_keys(first, 2 * ROWS, q_len, kv_len, CAUSAL), BLOCK):
            mbarrier.wait(shared.empty.index(stage), phase)
            tail_phase = load_pair(
                other, k_start + start, head // GROUP * STEP_K, head // GROUP * STEP_V, shared.other, stage,
                shared.full.index(stage), shared.tail, tail_phase, kv_len - start, BLOCK, D, DV,
            )  # fmt: skip
            stage, phase = advance(stage, phase, STAGES)
    return Places(stage, phase, slot, work_phase, own_phase, tail_phase)


@gluon.jit
def produce(
    shared, own, other, dq, cu_seqlens_q, cu_seqlens_k, counter, num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Draw tiles, the heaviest of a causal sequence first. own, other: descriptors, as the tiles of `shared`."""
    produce_tiles(
        shared, clear_tile, (dq, num_rows, NUM_HEADS, D), produce_tile,
        (
            own, other, cu_seqlens_q, cu_seqlens_k, num_sequences,
            GROUP, BLOCK, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
        ),
        cu_seqlens_q, counter, num_sequences, num_tiles, NUM_HEADS, True,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles"])
def queries_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, do_desc, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, counter,
    c, scale, num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dq (T, NUM_HEADS, D), contiguous, of all tiles of 128 query rows; arguments as those of `keys_kernel`, keys and
    values in boxes of BLOCK rows."""
    shared = QueriesShared(
        allocate_pair(q_desc, q_rest_desc, do_desc, 2, ROWS, D, DV),
        allocate_pair(k_desc, k_rest_desc, v_desc, STAGES, BLOCK, D, DV),
        work_ring(), barriers(2, 1), barriers(2, 1), barriers(STAGES, 1), barriers(STAGES, 2),
        barriers(2, 1), barriers(2, 2), barriers(1, 1),
    )  # fmt: skip
    own = Pair(Columns(q_desc, q_rest_desc if rest_width(D) > 0 else q_desc), do_desc)
    other = Pair(Columns(k_desc, k_rest_desc if rest_width(D) > 0 else k_desc), v_desc)
    gl.warp_specialize(
        [
            (consume, (shared, dq, lse, delta, c, scale, num_rows, 0, NUM_HEADS, BLOCK, D, CAUSAL, STAGES, AHEAD)),
            (consume, (shared, dq, lse, delta, c, scale, num_rows, 1, NUM_HEADS, BLOCK, D, CAUSAL, STAGES, AHEAD)),
            (
                produce,
                (
                    shared, own, other, dq, cu_seqlens_q, cu_seqlens_k, counter, num_rows, num_sequences, num_tiles,
                    NUM_HEADS, GROUP, BLOCK, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
