"""Persistent grouped product whose weights travel through tensor descriptors (sm_90 and newer).

Rows come through a descriptor where they stand in the order of places, and through pointers where they are gathered.
Same reduction as ``linear.tma``. A block may reach into the next expert's rows: they are computed and not stored. It
never reaches into the next expert's matrix, which is a dimension of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vexact.ops.kernels.linear.tma import halves
from vexact.ops.kernels.moe.epilogue import gated
from vexact.ops.kernels.moe.places import find_tile, tiles_of_experts


@triton.jit
def load_weight(desc, expert, col, k, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, K_MAJOR: tl.constexpr):
    """(BLOCK_K, COLUMNS) of an expert's matrix stored as (E, N, K) when K_MAJOR, else as (E, K, N)."""
    if K_MAJOR:
        return tl.trans(tl.reshape(desc.load([expert, col, k]), (COLUMNS, BLOCK_K)))
    else:
        return tl.reshape(desc.load([expert, k, col]), (BLOCK_K, COLUMNS))


@triton.jit
def load_half(desc, expert, half, col, k, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_K, COLUMNS) of the gate (half 0) or up (half 1), or of both side by side where the block has both."""
    return tl.trans(tl.reshape(desc.load([expert, half, col, k]), (COLUMNS, BLOCK_K)))


@triton.jit
def add_product(x, w, acc, SWAP: tl.constexpr):
    """acc + x @ w, or its transpose when SWAP."""
    if SWAP:
        return tl.dot(tl.trans(w), tl.trans(x), acc)
    else:
        return tl.dot(x, w, acc)


@triton.jit
def store_own(desc, values, first, end, col, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Round and store the rows of a tile whose places are before ``end``; see ``own_rows``."""
    own = tl.minimum(end - first, BLOCK_M)
    desc.store([first + own, BLOCK_M - own, col], tl.reshape(values.to(desc.dtype), (1, BLOCK_M, WIDTH)))


@triton.jit
def store_tile(desc, acc, first, end, col, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """``store_own`` in SPLITS strips of WIDTH columns."""
    if SPLITS == 1:
        store_own(desc, acc, first, end, col, WIDTH, BLOCK_M)
    else:
        left, right = halves(acc)
        if SPLITS == 2:
            store_own(desc, left, first, end, col, WIDTH, BLOCK_M)
            store_own(desc, right, first, end, col + WIDTH, WIDTH, BLOCK_M)
        else:
            one, two = halves(left)
            store_own(desc, one, first, end, col, WIDTH, BLOCK_M)
            store_own(desc, two, first, end, col + WIDTH, WIDTH, BLOCK_M)
            three, four = halves(right)
            store_own(desc, three, first, end, col + 2 * WIDTH, WIDTH, BLOCK_M)
            store_own(desc, four, first, end, col + 3 * WIDTH, WIDTH, BLOCK_M)


@triton.jit
def multiply_rows(
    x_desc, weight_desc, rows_ptr, expert, first, end, col, K, stride_x, dtype: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, GATHER: tl.constexpr, GATED: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 sums of the places from ``first`` on; SwiGLU of them when GATED."""
    COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED and JOINT else BLOCK_N
    depth = tl.arange(0, BLOCK_K)
    if GATHER:
        places = first + tl.arange(0, BLOCK_M)
        token = tl.load(rows_ptr + places, mask=places < end, other=0) // TOP_K
        x_rows = x_desc + token.to(tl.int64)[:, None] * stride_x
    if SWAP:
        acc = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    if GATED and not JOINT:
        acc_up = acc
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        if GATED:
            w = load_half(weight_desc, expert, 0, col, k, COLUMNS, BLOCK_K)
        else:
            w = load_weight(weight_desc, expert, col, k, COLUMNS, BLOCK_K, K_MAJOR)
        if not GATHER:
            x = x_desc.load([first, k])
        elif EVEN_K:
            x = tl.load(x_rows + (k + depth)[None, :])
        else:
            x = tl.load(x_rows + (k + depth)[None, :], mask=(k + depth < K)[None, :], other=0.0)
        acc = add_product(x, w, acc, SWAP)
        if GATED and not JOINT:
            up = load_half(weight_desc, expert, 1, col, k, COLUMNS, BLOCK_K)
            acc_up = add_product(x, up, acc_up, SWAP)
    if GATED and not JOINT:
        acc = gated(acc, acc_up, dtype)
    if SWAP:
        acc = tl.trans(acc)
    if GATED and JOINT:
        gate, up = halves(acc)
        acc = gated(gate, up, dtype)
    return acc


@triton.jit
def grouped_tma_kernel(
    x_desc,  # (P, K), or a pointer to (T, K) when GATHER
    half_x_desc,  # the same in blocks of half the height when HALVES and not GATHER
    weight_desc,  # (E, N, K) when K_MAJOR, else (E, K, N); (E, 2, N, K) when GATED
    out_desc,  # own_rows of (P, N), blocks of BLOCK_M x BLOCK_N / SPLITS
    half_out_desc,  # the same in blocks of half the height when HALVES
    rows_ptr,  # (P,) pair of a place, or any pointer unless GATHER
    offsets_ptr,  # (E + 1,)
    num_experts,
    N,
    K,
    stride_x,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    FLATTEN: tl.constexpr,
    HALVES: tl.constexpr,
    K_MAJOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    JOINT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tiles of places of one expert times its matrix; SPLITS and FLATTEN are those of ``matmul_tma_kernel``.

    JOINT multiplies with gate and up at once, as one tile twice as wide: a block of both is one piece of shared memory
    where BLOCK_K is one swizzled span. HALVES takes half the height for the last tile of an expert where that is
    enough. With OVERLAP the kernel is launched while the one before it ends, and so is the next.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    WIDTH: tl.constexpr = BLOCK_N // SPLITS
    HALF: tl.constexpr = BLOCK_M // 2
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles, past = tiles_of_experts(offsets_ptr, num_experts, BLOCK_M, EXPERTS)
    stored = tl.program_id(0)
    for at in tl.range(tl.program_id(0), tl.max(past, 0) * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end = find_tile(at // tiles_n, tiles, past, offsets_ptr, BLOCK_M)
        col = at % tiles_n * BLOCK_N
        if HALVES:
            if end - first <= HALF:
                part = multiply_rows(
                    half_x_desc, weight_desc, rows_ptr, expert, first, end, col, K, stride_x, out_desc.dtype,
                    TOP_K, HALF, BLOCK_N, BLOCK_K, SWAP, K_MAJOR, EVEN_K, GATHER, GATED, JOINT,
                )  # fmt: skip
                store_tile(half_out_desc, part, first, end, col, WIDTH, SPLITS, HALF)
            else:
                acc = multiply_rows(
                    x_desc, weight_desc, rows_ptr, expert, first, end, col, K, stride_x, out_desc.dtype,
                    TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_MAJOR, EVEN_K, GATHER, GATED, JOINT,
                )  # fmt: skip
                store_tile(out_desc, acc, first, end, col, WIDTH, SPLITS, BLOCK_M)
        else:
            acc = multiply_rows(
                x_desc, weight_desc, rows_ptr, expert, first, end, col, K, stride_x, out_desc.dtype,
                TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, K_MAJOR, EVEN_K, GATHER, GATED, JOINT,
            )  # fmt: skip
            if FLATTEN:  # found again, so that the epilogue does not hold the prologue's values: see matmul_tma_kernel
                expert, first, end = find_tile(stored // tiles_n, tiles, past, offsets_ptr, BLOCK_M)
                col = stored % tiles_n * BLOCK_N
                stored += tl.num_programs(0)
            store_tile(out_desc, acc, first, end, col, WIDTH, SPLITS, BLOCK_M)
