"""Grouped product through pointers: every GPU, every stride, every dtype.

The reduction is that of ``linear.pointer``: K from 0 to K - 1 in one fp32 accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.linear.tma import halves
from vexact.ops.kernels.moe.epilogue import gated, store_rows
from vexact.ops.kernels.moe.places import find_tile, tiles_of_experts


@triton.jit
def grouped_pointer_kernel(
    x_ptr,  # (P, K), or (T, K) when GATHER
    weight_ptr,  # (E, N, K), or (E, 2 * N, K) when GATED
    out_ptr,  # (P, N) contiguous
    rows_ptr,  # (P,) pair of a place, or any pointer unless GATHER
    offsets_ptr,  # (E + 1,)
    num_experts,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the places of one expert times its matrix. SWAP is that of ``matmul_pointer_kernel``."""
    COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    col = tl.program_id(0) % tiles_n * BLOCK_N
    tiles, past = tiles_of_experts(offsets_ptr, num_experts, BLOCK_M, EXPERTS)
    if tile >= tl.max(past, 0):
        return
    expert, first, end = find_tile(tile, tiles, past, offsets_ptr, BLOCK_M)
    places = first + tl.arange(0, BLOCK_M)
    in_rows = (places < end)[:, None]
    if GATHER:
        x_rows = tl.load(rows_ptr + places, mask=places < end, other=0) // TOP_K
    else:
        x_rows = places
    within = tl.arange(0, COLUMNS) % BLOCK_N
    in_cols = (col + within < N)[:, None]
    cols = col + within + (tl.arange(0, COLUMNS) // BLOCK_N) * N  # of up after those of the gate
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xm + depth[None, :] * stride_xk
    w_ptrs = weight_ptr + expert.to(tl.int64) * stride_we
    w_ptrs += cols.to(tl.int64)[:, None] * stride_wn + depth[None, :] * stride_wk
    if SWAP:
        acc = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            in_x, in_w = in_rows, in_cols
        else:
            in_depth = (depth < K - start)[None, :]
            in_x, in_w = in_rows & in_depth, in_cols & in_depth
        x = tl.load(x_ptrs, mask=in_x, other=0.0)
        w = tl.load(w_ptrs, mask=in_w, other=0.0)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if SWAP:
        acc = tl.trans(acc)
    if GATED:
        gate, up = halves(acc)
        acc = gated(gate, up, out_ptr.dtype.element_ty)
    store_rows(out_ptr, N, acc, first, end, col, N, BLOCK_N, BLOCK_M)
