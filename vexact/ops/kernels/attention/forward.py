"""The forward kernel that walks a sequence's chunks one after another: training, prefill, chunked prefill.

One program computes one tile of query rows. Keys are packed rows (PAGE_SIZE 0) or pages of a cache behind a block
table.
"""

import triton
import triton.language as tl

from vexact.ops.kernels.attention.columns import Columns, load_columns
from vexact.ops.kernels.attention.keys import Keys
from vexact.ops.kernels.attention.rows import find_sequence, key_limits, row_coordinates, unowned_rows
from vexact.ops.kernels.attention.step import finish
from vexact.ops.kernels.attention.walk import walk_keys


@triton.jit
def load_queries(
    q, row, head, valid, stride_qt, stride_qh, D: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """Columns of BLOCK_M query rows; rows that are not valid read as 0."""
    return load_columns(q + (row.to(tl.int64) * stride_qt + head * stride_qh)[:, None], valid, D, D_PAD, True)


@triton.jit
def store_rows(
    out, lse, value, lse_value, row, head, valid, NUM_HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr
):  # fmt: skip
    """Write finished rows to out (T, NUM_HEADS, DV) and lse (T, NUM_HEADS)."""
    offs_dv = tl.arange(0, DV_PAD)
    flat = row.to(tl.int64) * NUM_HEADS + head
    tl.store(lse + flat, lse_value, mask=valid)
    mask = valid[:, None] & (offs_dv < DV)[None, :]
    tl.store(out + flat[:, None] * DV + offs_dv[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def clear_rows(
    out, lse, row, head, valid,
    NUM_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Write what a row without keys has: 0 to out and -inf to lse."""
    nothing = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    zeros = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
    store_rows(out, lse, zeros, nothing, row, head, valid, NUM_HEADS, DV, DV_PAD)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles", "stride_table", "skip_up_to"])
def forward_kernel(
    q, k, v, k_desc, k_rest_desc, v_desc, out, lse, cu_seqlens_q, kv_lengths, table, c,
    num_rows, num_sequences, num_tiles, stride_table, skip_up_to,
    stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DESCRIBED: tl.constexpr, STEP_K: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of query rows.

    q (T, NUM_HEADS, D); k (Tk, Hkv, D) and v (Tk, Hkv, DV), or with PAGE_SIZE > 0 (pages, PAGE_SIZE, Hkv, ...);
    k_desc, k_rest_desc and v_desc: the same as (rows, columns), read only if DESCRIBED, the second one None where D_PAD
    columns hold a key; STEP_K and STEP_V columns lie between the starts of two heads;
    kv_lengths: cu_seqlens_k (B + 1,) if packed, seqused_k (B,) if paged; table (B, stride_table) int32, read only if
    paged; out (T, NUM_HEADS, DV) contiguous; lse (T, NUM_HEADS) fp32. Sequences of at most `skip_up_to` query rows are
    left alone, rows past the last sequence are cleared. CHUNK 0: no sequence has more than one chunk. The heaviest
    tiles of a causal sequence start first.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // TILE_HEADS
    HEAD_TILES: tl.constexpr = NUM_HEADS // TILE_HEADS
    pid = tl.program_id(0)
    first_head = pid % HEAD_TILES * TILE_HEADS
    tile = num_tiles - 1 - pid // HEAD_TILES
    unowned = unowned_rows(cu_seqlens_q, num_sequences, tile, BLOCK_Q)
    if unowned >= 0:
        offs_m = tl.arange(0, BLOCK_M)
        row = unowned + offs_m // TILE_HEADS
        inside = (offs_m < BLOCK_Q * TILE_HEADS) & (row < num_rows)
        clear_rows(out, lse, row, first_head + offs_m % TILE_HEADS, inside, NUM_HEADS, BLOCK_M, DV, DV_PAD)
        return
    sequence, block = find_sequence(cu_seqlens_q, num_sequences, tile, BLOCK_Q)
    q_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_start
    first = block * BLOCK_Q
    if (first >= q_len) | (q_len <= skip_up_to):
        return
    kv_head = (first_head // GROUP).to(tl.int64)
    k_base = k + kv_head * stride_kh
    v_base = v + kv_head * stride_vh
    if PAGE_SIZE == 0:
        k_start = tl.load(kv_lengths + sequence)
        kv_len = tl.load(kv_lengths + sequence + 1) - k_start
        k_base += k_start.to(tl.int64) * stride_kt
        v_base += k_start.to(tl.int64) * stride_vt
    else:
        k_start = 0
        kv_len = tl.load(kv_lengths + sequence)
        table += sequence.to(tl.int64) * stride_table
    position, tile_head, valid = row_coordinates(first, BLOCK_M, BLOCK_Q, TILE_HEADS, q_len)
    limit, end, full_end = key_limits(position, valid, first, q_len, kv_len, BLOCK_Q, BLOCK_N, CAUSAL)
    head = first_head + tile_head
    q_tile = load_queries(q, q_start + position, head, valid, stride_qt, stride_qh, D, D_PAD)
    keys = Keys(
        k_base, v_base, Columns(k_desc, k_rest_desc if D > D_PAD else k_desc), v_desc, k_start,
        first_head // GROUP * STEP_K, first_head // GROUP * STEP_V, table, kv_len,
        stride_kp, stride_kt, stride_vp, stride_vt,
    )  # fmt: skip
    m, total, acc = walk_keys(
        q_tile, limit, c, keys, 0, end, full_end,
        BLOCK_M, BLOCK_N, CHUNK, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
    )  # fmt: skip
    value, lse_value = finish(m, total, acc, c)
    store_rows(out, lse, value, lse_value, q_start + position, head, valid, NUM_HEADS, DV, DV_PAD)
