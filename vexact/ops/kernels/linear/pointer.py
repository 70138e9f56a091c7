"""Matrix product through pointers: every GPU, every stride, every dtype.

The reduction walks K from 0 to K - 1 in one fp32 accumulator, so the tile shape, the number of warps and the number of
stages decide speed only. See ``tma`` for the variant that fetches tiles with the tensor memory accelerator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.chain import follow


@triton.jit
def tile_coordinates(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of the ``tile``-th tile: GROUP_M row tiles share a column of B before the walk moves on."""
    per_group = GROUP_M * tiles_n
    first = (tile // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    local = tile % per_group
    return first + local % rows, local // rows


@triton.jit(do_not_specialize=["M", "N", "K_UNITS"])
def matmul_pointer_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (N, K)
    c_ptr,  # (M, N)
    bias_ptr,  # (N,)
    M,
    N,
    K_UNITS,  # K / K_UNIT
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_cm,
    stride_cn,
    K_UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """C = A Bᵀ (+ bias), or with ACCUMULATE C += A Bᵀ for an fp32 C.

    K_UNIT and N_UNIT tell the compiler what divides K and N (16, or 1 when nothing does), so that one binary with
    vector accesses serves every batch size. SWAP computes the transposed tile, which lets a 64-wide BLOCK_N use the
    warp-group tensor core instructions when there are few rows. CHAINED: see ``chain``.
    """
    K = K_UNITS * K_UNIT
    columns = (N // N_UNIT) * N_UNIT
    tile_m, tile_n = tile_coordinates(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    follow(CHAINED)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    in_rows = (rows < M)[:, None]
    in_cols = (cols < columns)[:, None]
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * stride_am + depth.to(tl.int64)[None, :] * stride_ak
    b_ptrs = b_ptr + cols.to(tl.int64)[:, None] * stride_bn + depth.to(tl.int64)[None, :] * stride_bk
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=in_rows, other=0.0)
            b = tl.load(b_ptrs, mask=in_cols, other=0.0)
        else:
            in_depth = (depth < K - start)[None, :]
            a = tl.load(a_ptrs, mask=in_rows & in_depth, other=0.0)
            b = tl.load(b_ptrs, mask=in_cols & in_depth, other=0.0)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + rows.to(tl.int64)[:, None] * stride_cm + cols.to(tl.int64)[None, :] * stride_cn
    in_tile = in_rows & (cols < columns)[None, :]
    if ACCUMULATE:
        acc += tl.load(c_ptrs, mask=in_tile, other=0.0)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=in_tile)
