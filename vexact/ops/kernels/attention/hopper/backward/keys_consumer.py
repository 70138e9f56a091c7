"""A consumer of the warp-specialised dK and dV: 64 keys of a tile, which walk the query rows that see them."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from vexact.ops.kernels.attention.columns import Columns
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
from vexact.ops.kernels.attention.hopper.shared import ROWS, advance
from vexact.ops.kernels.attention.hopper.tiles import consume_tiles
from vexact.ops.kernels.attention.hopper.weights import accumulator


class Seen(NamedTuple):
    """The query rows that the keys of one consumer see: the same ones in every head of the group."""

    begin: tl.tensor
    end: tl.tensor
    skipped: tl.tensor  # blocks of each head that only the other consumer sees
    first: tl.tensor  # of the keys
    shift: tl.tensor  # row r sees the keys up to r + shift


@gluon.jit
def first_row(first, q_len, kv_len, BLOCK: gl.constexpr, CAUSAL: gl.constexpr):
    """Where the walk over query rows begins for the keys from `first` on."""
    begin = 0
    if CAUSAL:
        begin = gl.maximum(first - (kv_len - q_len), 0) // BLOCK * BLOCK
    return begin


@gluon.jit
def skip(shared, stage, phase, count, STAGES: gl.constexpr):
    """Pass over blocks of rows that only the other consumer sees."""
    for _ in range(count):
        mbarrier.wait(shared.full.index(stage), phase)
        mbarrier.arrive(shared.empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def start_rows(shared, k, stage, BLOCK: gl.constexpr, D: gl.constexpr):
    """Start the scores of the rows in a stage, and fetch what makes exponents of them."""
    s = start_scores(k, stage_of(shared.other.wide, stage, D), BLOCK, D)
    return s, shared.minus_lse.index(stage).load(gl.SliceLayout(0, accumulator(BLOCK)))


@gluon.jit
def add_rows(
    shared, k, v, x, dp, dk, dv, seen, start, stage, phase, c,
    BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Add the rows at `start`, whose exponents x are there and whose gradients of weights dp are in flight, and start
    those of the next ones, of the next head maybe, if there are MORE; see `backward_queries.add_keys`."""
    layout: gl.constexpr = accumulator(BLOCK)
    dtype: gl.constexpr = shared.other.narrow.dtype
    following, following_phase = advance(stage, phase, STAGES)
    p = gl.exp2(x)
    if CAUSAL:  # noqa: SIM102 - a compile-time branch
        if seen.first + ROWS - 1 > start + seen.shift:
            keys = seen.first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            rows = start + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
            p = gl.where(keys[:, None] <= rows[None, :] + seen.shift, p, 0.0)
    weights = as_factors(p, dtype)
    start = start + BLOCK
    if MORE:
        if start >= seen.end:
            start = seen.begin
            if CAUSAL:
                following, following_phase = skip(shared, following, following_phase, seen.skipped, STAGES)
        mbarrier.wait(shared.full.index(following), following_phase)
    # The exponentials stay ahead of this wait, because a branch or a barrier lies between.
    dp = warpgroup_mma_wait(0, deps=[dp])
    do = Columns(shared.other.narrow.index(stage), shared.other.narrow.index(stage))
    sums = start_sums(weights, do, Columns(dv, dv), DV)
    delta = shared.delta.index(stage).load(gl.SliceLayout(0, layout))
    ds = as_factors(p * (dp - delta[None, :]), dtype)
    dk = start_sums(ds, stage_of(shared.other.wide, stage, D), dk, D)
    if MORE and AHEAD:
        s, minus_lse = start_rows(shared, k, following, BLOCK, D)
        sums = wait_sums(sums, weights, 2 * products(D), DV)
        dk = wait_sums(dk, ds, products(D), D)
    else:
        sums = wait_sums(sums, weights, products(D), DV)
        dk = wait_sums(dk, ds, 0, D)
    mbarrier.arrive(shared.empty.index(stage), count=1)
    if MORE:
        if not AHEAD:
            s, minus_lse = start_rows(shared, k, following, BLOCK, D)
        dp = start_product(v, shared.other.narrow.index(following), BLOCK)
        x = exponents(warpgroup_mma_wait(1, deps=[s]), minus_lse[None, :], c)
    return x, dp, dk, sums.first, start, following, following_phase


@gluon.jit
def consume_tile(
    shared, tile, stage, phase, own_phase, k, v, dk, dv, c, scale, PART: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART of one tile; see `consume_tiles`."""
    kv_len, q_len = tile.length, tile.other_length
    first = tile.first + PART * ROWS
    begin = first_row(first, q_len, kv_len, BLOCK, CAUSAL)
    blocks = gl.where(first < kv_len, gl.cdiv(gl.maximum(q_len - begin, 0), BLOCK), 0)
    tile_begin = first_row(tile.first, q_len, kv_len, BLOCK, CAUSAL)
    skipped = gl.cdiv(gl.maximum(q_len - tile_begin, 0), BLOCK) - blocks
    seen = Seen(begin, q_len, skipped, first, kv_len - q_len)
    dk_acc = zero_sums(D)
    dv_acc = gl.zeros([ROWS, DV], gl.float32, accumulator(DV))
    mbarrier.wait(shared.own_full.index(PART), own_phase)
    own_phase ^= 1
    stage, phase = skip(shared, stage, phase, gl.where(blocks > 0, skipped, skipped * GROUP), STAGES)
    if blocks > 0:
        mbarrier.wait(shared.full.index(stage), phase)
        s, minus_lse = start_rows(shared, k, stage, BLOCK, D)
        dp = start_product(v, shared.other.narrow.index(stage), BLOCK)
        x = exponents(warpgroup_mma_wait(1, deps=[s]), minus_lse[None, :], c)
        start = begin
        for _ in range(blocks * GROUP - 1):
            x, dp, dk_acc, dv_acc, start, stage, phase = add_rows(
                shared, k, v, x, dp, dk_acc, dv_acc, seen, start, stage, phase, c,
                BLOCK, D, DV, CAUSAL, STAGES, AHEAD, True,
            )  # fmt: skip
        _, _, dk_acc, dv_acc, _, stage, phase = add_rows(
            shared, k, v, x, dp, dk_acc, dv_acc, seen, start, stage, phase, c,
            BLOCK, D, DV, CAUSAL, STAGES, AHEAD, False,
        )  # fmt: skip
    store_gradient(dk, k, dk_acc, scale, tile.start, first, tile.head, kv_len, KV_HEADS, D)
    both = Columns(v, v), Columns(dv_acc, dv_acc)
    store_gradient(dv, *both, 1.0, tile.start, first, tile.head, kv_len, KV_HEADS, DV)
    mbarrier.arrive(shared.own_empty.index(PART), count=1)
    return stage, phase, own_phase


@gluon.jit
def consume(
    shared, dk, dv, c, scale, PART: gl.constexpr,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Gradients of part PART (0 or 1) of every tile."""
    k = stage_of(shared.own.wide, PART, D)
    v = shared.own.narrow.index(PART)
    consume_tiles(
        shared, consume_tile,
        (k, v, dk, dv, c, scale, PART, KV_HEADS, GROUP, BLOCK, D, DV, CAUSAL, STAGES, AHEAD),
    )  # fmt: skip
