"""Product of hidden states and the vocabulary weight whose epilogue forms the log-prob states of its blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.linear.pointer import tile_coordinates
from vexact.ops.kernels.linear.tma import halves, joined, multiply_tile
from vexact.ops.kernels.logprob import block_state, block_top, exponential_terms, scaled


@triton.jit
def block_exponentials(first, second, third, fourth):
    """e^(z - m) of a block in quarters (R, BLOCK / 4) -> (R, BLOCK); what ``block_state`` sums, kept once by CSE."""
    _, base = block_top(first, second, third, fourth)
    p0, _ = exponential_terms(first, base)
    p1, _ = exponential_terms(second, base)
    p2, _ = exponential_terms(third, base)
    p3, _ = exponential_terms(fourth, base)
    return joined(joined(p0, p1), joined(p2, p3))


@triton.jit
def store_strip_states(
    exponentials_desc,
    logit,  # (BLOCK_M, WIDTH), one block of the vocabulary
    row,
    column,
    M,
    N,
    blocks,
    top_ptr,
    total_ptr,
    moment_ptr,
    chosen_ptr,
    target_ptr,
    inv_temperature_ptr,
    min_logit_ptr,
    WIDTH: tl.constexpr,
    QUARTER_LEVELS: tl.constexpr,
    STORE_EXPONENTIALS: tl.constexpr,
):
    """Store the state of one block for every row of the tile, and the target's logit where the block holds it."""
    rows = row + tl.arange(0, logit.shape[0])
    in_rows = rows < M
    columns = column + tl.arange(0, WIDTH)[None, :]
    inv_temperature = tl.load(inv_temperature_ptr + rows, mask=in_rows, other=0.0)[:, None]
    min_logit = tl.load(min_logit_ptr + rows, mask=in_rows, other=0.0)[:, None]
    left, right = halves(scaled(logit, inv_temperature, min_logit, columns, N))
    first, second = halves(left)
    third, fourth = halves(right)
    if STORE_EXPONENTIALS:
        # Before the sums, which then run while the tile is being written.
        exponentials = block_exponentials(first, second, third, fourth)
        exponentials_desc.store([row, column], exponentials.to(exponentials_desc.dtype))
    top, total, moment = block_state(first, second, third, fourth, QUARTER_LEVELS)
    at = rows.to(tl.int64) * blocks + column // WIDTH
    tl.store(top_ptr + at, top, mask=in_rows)
    tl.store(total_ptr + at, total, mask=in_rows)
    tl.store(moment_ptr + at, moment, mask=in_rows)

    target = tl.load(target_ptr + rows, mask=in_rows, other=-1)
    # At most one term is not zero, so the sum is exact in any order.
    chosen = tl.sum(tl.where(columns == target[:, None], logit, 0.0), 1)
    tl.store(chosen_ptr + rows, chosen, mask=in_rows & (target >= column) & (target < tl.minimum(column + WIDTH, N)))


@triton.jit(do_not_specialize=["M", "N", "K"])
def matmul_states_kernel(
    a_desc,  # hidden (M, K)
    b_desc,  # weight (N, K)
    exponentials_desc,  # (M, N) e^(z - m), blocks of BLOCK_M x WIDTH; unused without STORE_EXPONENTIALS
    top_ptr,  # (M, blocks) fp32, as the next two
    total_ptr,
    moment_ptr,
    chosen_ptr,  # (M,) fp32
    target_ptr,  # (M,) int64
    inv_temperature_ptr,  # (M,) fp32
    min_logit_ptr,  # (M,) fp32
    M,
    N,
    K,
    blocks,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    QUARTER_LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_EXPONENTIALS: tl.constexpr,
):
    """The product of ``matmul_tma_kernel`` in tiles of BLOCK_M x 4 WIDTH, where WIDTH is a log-prob block."""
    BLOCK_N: tl.constexpr = 4 * WIDTH
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    stored = tl.program_id(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = tile_coordinates(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = multiply_tile(a_desc, b_desc, acc, tile_m * BLOCK_M, tile_n * BLOCK_N, K, BLOCK_K, True, True, False)
        tile_m, tile_n = tile_coordinates(stored, tiles_m, tiles_n, GROUP_M)
        stored += tl.num_programs(0)
        left, right = halves(acc)
        for side in tl.static_range(2):
            first, second = halves(left if side == 0 else right)
            for strip in tl.static_range(2):
                logit = first if strip == 0 else second
                column = tile_n * BLOCK_N + (2 * side + strip) * WIDTH
                store_strip_states(
                    exponentials_desc,
                    logit,
                    tile_m * BLOCK_M,
                    column,
                    M,
                    N,
                    blocks,
                    top_ptr,
                    total_ptr,
                    moment_ptr,
                    chosen_ptr,
                    target_ptr,
                    inv_temperature_ptr,
                    min_logit_ptr,
                    WIDTH,
                    QUARTER_LEVELS,
                    STORE_EXPONENTIALS,
                )
