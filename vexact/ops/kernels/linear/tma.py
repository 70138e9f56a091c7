"""Persistent matrix product whose tiles travel through tensor descriptors (sm_90 and newer).

Same reduction as ``pointer``: K from 0 to K - 1 in one fp32 accumulator. Descriptors fill what lies outside a
matrix with zeros, so ragged edges need no masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.chain import follow
from vexact.ops.kernels.linear.pointer import tile_coordinates


@triton.jit
def load_operand(desc, row, k, K_MAJOR: tl.constexpr):
    """A (rows, depth) tile of an operand stored as (rows, K) when K_MAJOR, else as (K, rows)."""
    if K_MAJOR:
        return desc.load([row, k])
    else:
        return tl.trans(desc.load([k, row]))


@triton.jit
def multiply_tile(
    a_desc,
    b_desc,
    acc,
    row,
    col,
    K,
    BLOCK_K: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Walk K and add to ``acc``: (BLOCK_M, BLOCK_N), or its transpose when SWAP."""
    for step in range(tl.cdiv(K, BLOCK_K)):
        a = load_operand(a_desc, row, step * BLOCK_K, A_K_MAJOR)
        b = load_operand(b_desc, col, step * BLOCK_K, B_K_MAJOR)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc)
        else:
            acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def store_columns(
    c_desc, bias_ptr, acc, row, col, N, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr
):
    """Add the bias in fp32, round once, store; or add to the fp32 C.

    The addition is left to the memory system (a bulk reduction, so the tile is not read back): every element receives
    exactly one addition per launch, hence no order to depend on.
    """
    if HAS_BIAS:
        cols = col + tl.arange(0, WIDTH)
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        c_desc.atomic_add([row, col], acc)
    else:
        c_desc.store([row, col], acc.to(c_desc.dtype))


@triton.jit
def halves(x):
    """Left and right half of the columns of ``x``, each in the order it had."""
    left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
    return left, right


@triton.jit
def joined(left, right):
    """The inverse of ``halves``: the columns of ``left``, then those of ``right``."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit(do_not_specialize=["M", "N", "K"])
def matmul_tma_kernel(
    a_desc,  # (M, K) when A_K_MAJOR, else (K, M)
    b_desc,  # (N, K) when B_K_MAJOR, else (K, N)
    c_desc,  # (M, N), blocks of BLOCK_M x BLOCK_N / SPLITS
    bias_ptr,  # (N,)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    FLATTEN: tl.constexpr,
    A_K_MAJOR: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """C = A Bᵀ (+ bias), or with ACCUMULATE C += A Bᵀ for an fp32 C.

    SPLITS stores the tile in 1, 2 or 4 column strips, whose smaller staging buffer leaves room for another stage.
    FLATTEN lets the loads of the next tile start under the epilogue of this one. CHAINED: see ``chain``.
    """
    WIDTH: tl.constexpr = BLOCK_N // SPLITS
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    follow(CHAINED)
    stored = tl.program_id(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        tile_m, tile_n = tile_coordinates(tile, tiles_m, tiles_n, GROUP_M)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = multiply_tile(
            a_desc, b_desc, acc, tile_m * BLOCK_M, tile_n * BLOCK_N, K, BLOCK_K, A_K_MAJOR, B_K_MAJOR, SWAP
        )
        # The coordinates are computed again so that the epilogue does not hold the prologue's values alive, which
        # would keep the two from overlapping in the flattened loop.
        tile_m, tile_n = tile_coordinates(stored, tiles_m, tiles_n, GROUP_M)
        stored += tl.num_programs(0)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        if SWAP:
            acc = tl.trans(acc)
        if SPLITS == 1:
            store_columns(c_desc, bias_ptr, acc, row, col, N, WIDTH, HAS_BIAS, ACCUMULATE)
        else:
            left, right = halves(acc)
            if SPLITS == 2:
                store_columns(c_desc, bias_ptr, left, row, col, N, WIDTH, HAS_BIAS, ACCUMULATE)
                store_columns(c_desc, bias_ptr, right, row, col + WIDTH, N, WIDTH, HAS_BIAS, ACCUMULATE)
            else:
                first, second = halves(left)
                store_columns(c_desc, bias_ptr, first, row, col, N, WIDTH, HAS_BIAS, ACCUMULATE)
                store_columns(c_desc, bias_ptr, second, row, col + WIDTH, N, WIDTH, HAS_BIAS, ACCUMULATE)
                third, fourth = halves(right)
                store_columns(c_desc, bias_ptr, third, row, col + 2 * WIDTH, N, WIDTH, HAS_BIAS, ACCUMULATE)
                store_columns(c_desc, bias_ptr, fourth, row, col + 3 * WIDTH, N, WIDTH, HAS_BIAS, ACCUMULATE)
