"""A consumer of the warp-specialised dQ: 64 query rows of a tile, which walk the keys they see in order."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from vexact.ops.kernels.attention.hopper.backward.gradients import (
    as_factors,
    exponents,
    products,
    start_product,
    start_scores,
    start_sums,
    store_gradient,
    wait_sums,
    zero_sums,
)
from vexact.ops.kernels.attention.hopper.loading import stage_of
from vexact.ops.kernels.attention.hopper.shared import ROWS, advance, visible_keys
from vexact.ops.kernels.attention.hopper.tiles import consume_tiles
from vexact.ops.kernels.attention.hopper.weights import accumulator


class Rows(NamedTuple):
    """What a consumer knows of its 64 rows, in the layout of a product's rows."""

    minus_lse: tl.tensor
    delta: tl.tensor
    limit: tl.tensor  # keys that a row sees
    full_end: tl.tensor  # keys that all of them see


@gluon.jit
def add_keys(
    shared, q, do, rows, x, dp, acc, start, stage, phase, c,
    BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Add the keys at `start`, whose exponents x are there and whose gradients of weights dp are in flight, and start
    those of the next ones if there are MORE: behind the sums if AHEAD, else when these are there.

    The assembler puts all products in series if one that is in flight where the loop begins again is not waited for
    together with all others.
    """
    dtype: gl.constexpr = shared.other.narrow.dtype
    following, following_phase = advance(stage, phase, STAGES)
    p = gl.exp2(x)
    if start + BLOCK > rows.full_end:
        keys = start + gl.arange(0, BLOCK, gl.SliceLayout(0, accumulator(BLOCK)))
        p = gl.where(keys[None, :] < rows.limit[:, None], p, 0.0)
    if MORE:
        mbarrier.wait(shared.full.index(following), following_phase)
    # The exponentials stay ahead of this wait, because a branch or a barrier lies between.
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = as_factors(p * (dp - rows.delta[:, None]), dtype)
    acc = start_sums(ds, stage_of(shared.other.wide, stage, D), acc, D)
    if MORE and AHEAD:
        s = start_scores(q, stage_of(shared.other.wide, following, D), BLOCK, D)
        acc = wait_sums(acc, ds, products(D), D)
    else:
        acc = wait_sums(acc, ds, 0, D)
    mbarrier.arrive(shared.empty.index(stage), count=1)
    if MORE:
        if not AHEAD:
            s = start_scores(q, stage_of(shared.other.wide, following, D), BLOCK, D)
        dp = start_product(do, shared.other.narrow.index(following), BLOCK)
        x = exponents(warpgroup_mma_wait(1, deps=[s]), rows.minus_lse[:, None], c)
    return x, dp, acc, following, following_phase


@gluon.jit
def consume_tile(
    shared, tile, stage, phase, own_phase, q, do, dq, lse, delta, c, scale, num_rows, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART of one tile; see `consume_tiles`."""
    row_layout: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK))
    q_len, kv_len = tile.length, tile.other_length
    first = tile.first + PART * ROWS
    row = first + gl.arange(0, ROWS, row_layout)
    limit = gl.where(row < q_len, kv_len, 0)
    full_end = kv_len
    if CAUSAL:
        shift = kv_len - q_len + 1
        limit = gl.where(row < q_len, gl.maximum(row + shift, 0), 0)
        full_end = first + shift
    statistics = tile.head.to(gl.int64) * num_rows + tile.start + row
    row_lse = gl.load(lse + statistics, mask=row < q_len, other=float("inf"))
    row_delta = gl.load(delta + statistics, mask=row < q_len, other=0.0)
    rows = Rows(-row_lse, row_delta, limit, full_end)
    acc = zero_sums(D)
    steps = gl.cdiv(visible_keys(first, ROWS, q_len, kv_len, CAUSAL), BLOCK)
    tile_steps = gl.cdiv(visible_keys(tile.first, 2 * ROWS, q_len, kv_len, CAUSAL), BLOCK)
    mbarrier.wait(shared.own_full.index(PART), own_phase)
    own_phase ^= 1
    if steps > 0:
        mbarrier.wait(shared.full.index(stage), phase)
        s = start_scores(q, stage_of(shared.other.wide, stage, D), BLOCK, D)
        dp = start_product(do, shared.other.narrow.index(stage), BLOCK)
        x = exponents(warpgroup_mma_wait(1, deps=[s]), rows.minus_lse[:, None], c)
        for step in range(0, steps - 1):
            x, dp, acc, stage, phase = add_keys(
                shared, q, do, rows, x, dp, acc, step * BLOCK, stage, phase, c, BLOCK, D, STAGES, AHEAD, True
            )
        _, _, acc, stage, phase = add_keys(
            shared, q, do, rows, x, dp, acc, (steps - 1) * BLOCK, stage, phase, c, BLOCK, D, STAGES, AHEAD, False
        )
    for _skipped in range(tile_steps - steps):
        mbarrier.wait(shared.full.index(stage), phase)
        mbarrier.arrive(shared.empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    store_gradient(dq, q, acc, scale, tile.start, first, tile.head, q_len, NUM_HEADS, D)
    mbarrier.arrive(shared.own_empty.index(PART), count=1)
    return stage, phase, own_phase


@gluon.jit
def consume(
    shared, dq, lse, delta, c, scale, num_rows, PART: gl.constexpr,
    NUM_HEADS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART (0 or 1) of every tile."""
    q = stage_of(shared.own.wide, PART, D)
    do = shared.own.narrow.index(PART)
    consume_tiles(
        shared, consume_tile,
        (q, do, dq, lse, delta, c, scale, num_rows, PART, NUM_HEADS, BLOCK, D, CAUSAL, STAGES, AHEAD),
    )  # fmt: skip
