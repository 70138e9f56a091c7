"""Weight gradients of all experts in one launch: dYᵀ X over each expert's places, in order, in one fp32 accumulator."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_places(ptr, stride, place, end, row_of_place, col, columns, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, BLOCK) of the rows ``row_of_place``, zeros from ``end`` on."""
    cols = col + tl.arange(0, BLOCK)
    here = place + tl.arange(0, BLOCK_K) < end
    ptrs = ptr + row_of_place.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptrs, mask=here[:, None] & (cols < columns)[None, :], other=0.0)


@triton.jit
def gradient_of_places(
    dy_desc,
    x_desc,
    dy_ptr,
    x_ptr,
    rows_ptr,
    begin,
    end,
    row,
    col,
    N,
    K,
    stride_dy,
    stride_x,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M x BLOCK_N in fp32 over the places ``begin`` to ``end``, BLOCK_K a step. Descriptors reach across experts,
    so the ragged last step goes through pointers."""
    depth = tl.arange(0, BLOCK_K)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for place in range(begin, whole, BLOCK_K):
        if DESCRIPTORS:
            dy = dy_desc.load([place, row])
        else:
            dy = load_places(dy_ptr, stride_dy, place, end, place + depth, row, N, BLOCK_M, BLOCK_K)
        if GATHER:
            token = tl.load(rows_ptr + place + depth) // TOP_K
            x = load_places(x_ptr, stride_x, place, end, token, col, K, BLOCK_N, BLOCK_K)
        elif DESCRIPTORS:
            x = x_desc.load([place, col])
        else:
            x = load_places(x_ptr, stride_x, place, end, place + depth, col, K, BLOCK_N, BLOCK_K)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    if whole < end:
        dy = load_places(dy_ptr, stride_dy, whole, end, whole + depth, row, N, BLOCK_M, BLOCK_K)
        if GATHER:
            token = tl.load(rows_ptr + whole + depth, mask=whole + depth < end, other=0) // TOP_K
            x = load_places(x_ptr, stride_x, whole, end, token, col, K, BLOCK_N, BLOCK_K)
        else:
            x = load_places(x_ptr, stride_x, whole, end, whole + depth, col, K, BLOCK_N, BLOCK_K)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def grouped_grad_weight_kernel(
    dy_desc,  # (P, N) when DESCRIPTORS
    x_desc,  # (P, K) when DESCRIPTORS and not GATHER
    dy_ptr,  # (P, N)
    x_ptr,  # (P, K), or (T, K) when GATHER
    out_ptr,  # (RANKS, E / RANKS, N, K) contiguous
    rows_ptr,  # (P,) pair of a place, or any pointer unless GATHER
    offsets_ptr,  # (E + 1,)
    N,
    K,
    stride_dy,
    stride_x,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATHER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M x BLOCK_N of the gradient of one expert. With RANKS > 1 so many neighbours among the E are the same
    expert, with places of as many ranks."""
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    row = tile // tiles_k * BLOCK_M
    col = tile % tiles_k * BLOCK_N
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    acc = gradient_of_places(
        *(dy_desc, x_desc, dy_ptr, x_ptr, rows_ptr, begin, end, row, col, N, K, stride_dy, stride_x),
        *(TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, GATHER, DESCRIPTORS, PRECISION),
    )
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    if RANKS > 1:
        expert = expert % RANKS * (tl.num_programs(0) // (tiles_n * tiles_k * RANKS)) + expert // RANKS
    out_ptrs = out_ptr + expert.to(tl.int64) * N * K + rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["counted"])
def grouped_grad_weight_sum_kernel(
    dy_desc,  # (P, N) when DESCRIPTORS
    x_desc,  # (P, K) when DESCRIPTORS
    dy_ptr,  # (P, N)
    x_ptr,  # (P, K)
    total_ptr,  # (E, N, K) fp32 contiguous
    offsets_ptr,  # (E * RANKS + 1,)
    N,
    K,
    stride_dy,
    stride_x,
    counted,  # of the RANKS, the first ones
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RANKS: tl.constexpr,
    FRESH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients that :func:`grouped_grad_weight_kernel` gives of one expert, rounded as it rounds them, added rank
    by rank onto ``total``, which begins with the first one when FRESH."""
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    row = tile // tiles_k * BLOCK_M
    col = tile % tiles_k * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    here = (rows < N)[:, None] & (cols < K)[None, :]
    ptrs = total_ptr + expert.to(tl.int64) * N * K + rows.to(tl.int64)[:, None] * K + cols[None, :]
    if FRESH:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        total = tl.load(ptrs, mask=here, other=0.0)
    for rank in range(counted):
        begin = tl.load(offsets_ptr + expert * RANKS + rank)
        end = tl.load(offsets_ptr + expert * RANKS + rank + 1)
        acc = gradient_of_places(
            *(dy_desc, x_desc, dy_ptr, x_ptr, offsets_ptr, begin, end, row, col, N, K, stride_dy, stride_x),
            *(1, BLOCK_M, BLOCK_N, BLOCK_K, False, DESCRIPTORS, PRECISION),
        )
        piece = acc.to(dy_ptr.dtype.element_ty).to(tl.float32)
        if FRESH:
            total = tl.where(rank == 0, piece, total + piece)  # 0 + -0 would be +0
        else:
            total += piece
    tl.store(ptrs, total, mask=here)
