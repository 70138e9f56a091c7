"""Backward of attention over packed sequences, without atomics: every gradient element is written by one program.

With P = exp(S - lse), dP = dO V^T, delta = rowsum(dO * O) and dS = P * (dP - delta) (Dao, "FlashAttention-2", 2023,
algorithm 2):

    dV = P^T dO        dK = scale * dS^T Q        dQ = scale * dS K

`prepare_kernel` computes delta once. `keys_kernel` owns a block of keys and walks the query rows that see it, for all
query heads of the group; `queries_kernel` owns a block of query rows and walks the keys it sees. Both recompute P
from lse, both skip what the causal mask hides, and both visit blocks in a fixed order, so gradients are the same bits
on every run.
"""

import triton
import triton.language as tl

from vexact.ops.kernels.attention.columns import (
    Columns,
    dot_columns,
    load_columns,
    load_tile,
    store_columns,
    zero_columns,
)
from vexact.ops.kernels.attention.rows import find_sequence, unowned_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["num_rows"])
def prepare_kernel(
    dout, out, lse, delta, lse2, num_rows,
    NUM_HEADS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta (Hq, T) = rowsum(dout * out) and lse2 (Hq, T) = lse * log2(e), +inf for rows that see no key so that P is
    0.

    dout, out (T, NUM_HEADS, DV) contiguous; lse (T, NUM_HEADS) fp32. Heads come first in the results so that the
    other kernels read consecutive rows.
    """
    head = tl.program_id(0) % NUM_HEADS
    row = tl.program_id(0) // NUM_HEADS * ROWS + tl.arange(0, ROWS)
    offs_dv = tl.arange(0, DV_PAD)
    inside = row < num_rows
    flat = row.to(tl.int64) * NUM_HEADS + head
    pointers = flat[:, None] * DV + offs_dv[None, :]
    mask = inside[:, None] & (offs_dv < DV)[None, :]
    product = tl.load(dout + pointers, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(out + pointers, mask=mask, other=0.0).to(tl.float32)
    log_sum = tl.load(lse + flat, mask=inside, other=0.0)
    target = head.to(tl.int64) * num_rows + row
    tl.store(delta + target, tl.sum(product, 1), mask=inside)
    tl.store(lse2 + target, tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E), mask=inside)


@triton.jit
def walk_queries(
    dk, dv, k, v, q_base, do_base, delta, lse2, begin, end, q_len, keys, shift, c, stride_qt, stride_dot,
    BLOCK_M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the query rows in [begin, end) to dK and dV; scores are transposed, (BLOCK_N, BLOCK_M)."""
    offs_dv = tl.arange(0, DV_PAD)
    offs_m = tl.arange(0, BLOCK_M)
    dk_first = dk.first
    dk_rest = dk.rest
    for start in tl.range(begin, end, BLOCK_M):
        row = start + offs_m
        inside = row < q_len
        first = tl.cast(start, tl.int64)
        q = load_columns(q_base + first * stride_qt + offs_m[:, None] * stride_qt, inside, D, D_PAD, True)
        row_lse = tl.load(lse2 + row, mask=inside, other=float("inf"))
        s = dot_columns(k, q, D, D_PAD)
        p = tl.math.exp2(s * c - row_lse[None, :])
        if MASKED:
            p = tl.where(keys[:, None] <= row[None, :] + shift, p, 0.0)
        do_rows = do_base + first * stride_dot + offs_m[:, None] * stride_dot + offs_dv[None, :]
        do = load_tile(do_rows, inside, offs_dv, DV, DV_PAD, True)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        row_delta = tl.load(delta + row, mask=inside, other=0.0)
        ds = p * (dp - row_delta[None, :])
        ds = ds.to(do.dtype)
        dk_first = tl.dot(ds, q.first, dk_first, input_precision="ieee")
        if D > D_PAD:
            dk_rest = tl.dot(ds, q.rest, dk_rest, input_precision="ieee")
    return Columns(dk_first, dk_rest), dv


@triton.jit
def clear_rows(target, row, num_rows, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """Write 0 to one head of these rows of target (num_rows, HEADS, WIDTH), which is at most twice WIDTH_PAD."""
    COVER: tl.constexpr = WIDTH_PAD if WIDTH <= WIDTH_PAD else 2 * WIDTH_PAD
    offs = tl.arange(0, COVER)[None, :]
    flat = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + offs
    mask = (row < num_rows)[:, None] & (offs < WIDTH)
    tl.store(target + flat, tl.zeros_like(flat).to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "num_tiles", "num_rows", "num_keys"])
def keys_kernel(
    dout, q, k, v, delta, lse2, dk, dv, cu_seqlens_q, cu_seqlens_k, c, scale,
    num_sequences, num_tiles, num_rows, num_keys, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dK (Tk, Hkv, D) and dV (Tk, Hkv, DV) of BLOCK_N keys of one key/value head, both contiguous.

    dout (T, NUM_HEADS, DV) contiguous; q, k, v with free token and head strides; delta, lse2 (NUM_HEADS, num_rows)
    fp32. Keys that no query sees, and keys past the last sequence, get 0.
    """
    KV_HEADS: tl.constexpr = NUM_HEADS // GROUP
    pid = tl.program_id(0)
    kv_head = (pid % KV_HEADS).to(tl.int64)
    unowned = unowned_rows(cu_seqlens_k, num_sequences, pid // KV_HEADS, BLOCK_N)
    if unowned >= 0:
        row = unowned + tl.arange(0, BLOCK_N)
        clear_rows(dk, row, num_keys, kv_head, KV_HEADS, D, D_PAD)
        clear_rows(dv, row, num_keys, kv_head, KV_HEADS, DV, DV_PAD)
        return
    sequence, block = find_sequence(cu_seqlens_k, num_sequences, pid // KV_HEADS, BLOCK_N)
    k_start = tl.load(cu_seqlens_k + sequence).to(tl.int64)
    kv_len = (tl.load(cu_seqlens_k + sequence + 1) - k_start).to(tl.int32)
    first_key = block * BLOCK_N
    if first_key >= kv_len:
        return
    q_start = tl.load(cu_seqlens_q + sequence).to(tl.int64)
    q_len = (tl.load(cu_seqlens_q + sequence + 1) - q_start).to(tl.int32)
    keys = first_key + tl.arange(0, BLOCK_N)
    offs_dv = tl.arange(0, DV_PAD)
    key_rows = k_start + keys
    k_tile = load_columns(k + kv_head * stride_kh + key_rows[:, None] * stride_kt, keys < kv_len, D, D_PAD, True)
    v_tile = load_tile(
        v + kv_head * stride_vh + key_rows[:, None] * stride_vt + offs_dv[None, :],
        keys < kv_len,
        offs_dv,
        DV,
        DV_PAD,
        True,
    )
    shift = kv_len - q_len
    if CAUSAL:
        begin = tl.maximum(first_key - shift, 0) // BLOCK_M * BLOCK_M
        middle = (tl.maximum(first_key + BLOCK_N - 1 - shift, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    else:
        begin = 0
        middle = 0
    middle = tl.minimum(middle, q_len)
    dk_acc = zero_columns(BLOCK_N, D, D_PAD)
    dv_acc = tl.zeros((BLOCK_N, DV_PAD), tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = q + q_start * stride_qt + head * stride_qh
        do_base = dout + (q_start * NUM_HEADS + head) * DV
        row_base = head * num_rows + q_start
        if CAUSAL:
            dk_acc, dv_acc = walk_queries(
                dk_acc, dv_acc, k_tile, v_tile, q_base, do_base, delta + row_base, lse2 + row_base,
                begin, middle, q_len, keys, shift, c, stride_qt, NUM_HEADS * DV, BLOCK_M, D, DV, D_PAD, DV_PAD, True,
            )  # fmt: skip
        dk_acc, dv_acc = walk_queries(
            dk_acc, dv_acc, k_tile, v_tile, q_base, do_base, delta + row_base, lse2 + row_base, middle, q_len, q_len,
            keys, shift, c, stride_qt, NUM_HEADS * DV, BLOCK_M, D, DV, D_PAD, DV_PAD, False,
        )  # fmt: skip
    flat = (key_rows * KV_HEADS + kv_head)[:, None]
    inside = keys < kv_len
    store_columns(dk, flat * D, inside, dk_acc, scale, D, D_PAD)
    mask = inside[:, None] & (offs_dv < DV)[None, :]
    tl.store(dv + flat * DV + offs_dv[None, :], dv_acc.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def walk_keys(
    dq, q, do, row_lse, row_delta, limit, k_base, v_base, begin, end, kv_len, c, stride_kt, stride_vt,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys in [begin, end) to dQ; row r sees the keys below limit[r]."""
    offs_dv = tl.arange(0, DV_PAD)
    offs_n = tl.arange(0, BLOCK_N)
    dq_first = dq.first
    dq_rest = dq.rest
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + offs_n
        inside = keys < kv_len
        first = tl.cast(start, tl.int64)
        k_rows = k_base + first * stride_kt + offs_n[:, None] * stride_kt
        v_rows = v_base + first * stride_vt + offs_n[:, None] * stride_vt + offs_dv[None, :]
        k = load_columns(k_rows, inside, D, D_PAD, MASKED)
        v = load_tile(v_rows, inside, offs_dv, DV, DV_PAD, MASKED)
        s = dot_columns(q, k, D, D_PAD)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        p = tl.math.exp2(s * c - row_lse[:, None])
        if MASKED:
            p = tl.where(keys[None, :] < limit[:, None], p, 0.0)
        ds = p * (dp - row_delta[:, None])
        ds = ds.to(do.dtype)
        dq_first = tl.dot(ds, k.first, dq_first, input_precision="ieee")
        if D > D_PAD:
            dq_rest = tl.dot(ds, k.rest, dq_rest, input_precision="ieee")
    return Columns(dq_first, dq_rest)


@triton.jit(do_not_specialize=["num_sequences", "num_tiles", "num_rows"])
def queries_kernel(
    dout, q, k, v, delta, lse2, dq, cu_seqlens_q, cu_seqlens_k, c, scale,
    num_sequences, num_tiles, num_rows, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dQ (T, NUM_HEADS, D), contiguous, of BLOCK_M query rows of one head, 0 past the last sequence. The heaviest tiles
    start first."""
    pid = tl.program_id(0)
    head = (pid % NUM_HEADS).to(tl.int64)
    tile = num_tiles - 1 - pid // NUM_HEADS
    unowned = unowned_rows(cu_seqlens_q, num_sequences, tile, BLOCK_M)
    if unowned >= 0:
        clear_rows(dq, unowned + tl.arange(0, BLOCK_M), num_rows, head, NUM_HEADS, D, D_PAD)
        return
    sequence, block = find_sequence(cu_seqlens_q, num_sequences, tile, BLOCK_M)
    q_start = tl.load(cu_seqlens_q + sequence).to(tl.int64)
    q_len = (tl.load(cu_seqlens_q + sequence + 1) - q_start).to(tl.int32)
    first_row = block * BLOCK_M
    if first_row >= q_len:
        return
    k_start = tl.load(cu_seqlens_k + sequence).to(tl.int64)
    kv_len = (tl.load(cu_seqlens_k + sequence + 1) - k_start).to(tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < q_len
    offs_dv = tl.arange(0, DV_PAD)
    q_rows = q_start + rows
    q_tile = load_columns(q + head * stride_qh + q_rows[:, None] * stride_qt, inside, D, D_PAD, True)
    do_rows = dout + ((q_rows * NUM_HEADS + head) * DV)[:, None] + offs_dv[None, :]
    do_tile = load_tile(do_rows, inside, offs_dv, DV, DV_PAD, True)
    row_lse = tl.load(lse2 + head * num_rows + q_rows, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + head * num_rows + q_rows, mask=inside, other=0.0)
    limit = tl.full((BLOCK_M,), 0, tl.int32) + kv_len
    end = kv_len
    full_end = kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        shift = kv_len - q_len + 1
        limit = tl.minimum(rows + shift, kv_len)
        end = tl.maximum(tl.minimum(first_row + BLOCK_M, q_len) - 1 + shift, 0)
        full_end = tl.maximum(first_row + shift, 0) // BLOCK_N * BLOCK_N
    kv_head = head // GROUP
    k_base = k + k_start * stride_kt + kv_head * stride_kh
    v_base = v + k_start * stride_vt + kv_head * stride_vh
    acc = zero_columns(BLOCK_M, D, D_PAD)
    acc = walk_keys(
        acc, q_tile, do_tile, row_lse, row_delta, limit, k_base, v_base, 0, full_end, kv_len, c, stride_kt, stride_vt,
        BLOCK_N, D, DV, D_PAD, DV_PAD, False,
    )  # fmt: skip
    acc = walk_keys(
        acc, q_tile, do_tile, row_lse, row_delta, limit, k_base, v_base, full_end, end, kv_len, c, stride_kt, stride_vt,
        BLOCK_N, D, DV, D_PAD, DV_PAD, True,
    )  # fmt: skip
    store_columns(dq, ((q_rows * NUM_HEADS + head) * D)[:, None], inside, acc, scale, D, D_PAD)
