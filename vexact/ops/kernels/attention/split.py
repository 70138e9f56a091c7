"""Decode: the chunks of a sequence in parallel programs, then a merge in the order the forward kernel would use.

Only short queries come here (`max_rows` positions per sequence at most), with all query heads of a key/value head in
one tile. A sequence that fits one chunk is finished by its only program and the merge kernel passes over it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.forward import clear_rows, load_queries, store_rows
from vexact.ops.kernels.attention.keys import Keys
from vexact.ops.kernels.attention.rows import key_limits, row_coordinates
from vexact.ops.kernels.attention.step import finish, merge_states
from vexact.ops.kernels.attention.walk import walk_keys

CHUNKS_IN_FLIGHT = tl.constexpr(8)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_chunks", "stride_table", "max_rows"])
def chunk_kernel(
    q, k, v, k_desc, k_rest_desc, v_desc, out, lse, part_acc, part_ml, cu_seqlens_q, kv_lengths, table, c,
    num_rows, num_sequences, num_chunks, stride_table, max_rows,
    stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, TILE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DESCRIBED: tl.constexpr, STEP_K: tl.constexpr, STEP_V: tl.constexpr,
    OVERLAP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The state of one chunk of keys for all rows of one sequence and one key/value head.

    part_acc (B, num_chunks, max_rows, NUM_HEADS, DV) fp32 and part_ml (..., NUM_HEADS, 2) fp32 receive the state of a
    sequence longer than one chunk; out and lse receive the finished rows of any other, and rows past the last sequence
    are cleared. The remaining arguments are those of the forward kernel. CHAINED: see `chain`.
    """
    if CHAINED:
        gdc_wait()
        if num_chunks == 1:  # no merge kernel
            gdc_launch_dependents()
    BLOCK_Q: tl.constexpr = BLOCK_M // TILE_HEADS
    HEAD_TILES: tl.constexpr = NUM_HEADS // TILE_HEADS
    pid = tl.program_id(0)
    first_head = pid % HEAD_TILES * TILE_HEADS
    sequence = pid // HEAD_TILES % num_sequences
    chunk = pid // HEAD_TILES // num_sequences
    q_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_start
    kv_len = tl.load(kv_lengths + sequence)
    if chunk == 0:
        offs_m = tl.arange(0, BLOCK_M)
        for unowned in tl.range(tl.load(cu_seqlens_q + num_sequences) + sequence, num_rows, num_sequences):
            row = unowned + tl.zeros_like(offs_m)
            clear_rows(out, lse, row, first_head + offs_m, offs_m < TILE_HEADS, NUM_HEADS, BLOCK_M, DV, DV_PAD)
    begin = chunk * CHUNK
    if (q_len == 0) | (q_len > max_rows) | ((begin >= kv_len) & (chunk > 0)):
        return
    position, tile_head, valid = row_coordinates(0, BLOCK_M, BLOCK_Q, TILE_HEADS, q_len)
    limit, end, full_end = key_limits(position, valid, 0, q_len, kv_len, BLOCK_Q, BLOCK_N, CAUSAL)
    head = first_head + tile_head
    row = q_start + position
    q_tile = load_queries(q, row, head, valid, stride_qt, stride_qh, D, D_PAD)
    kv_head = (first_head // GROUP).to(tl.int64)
    keys = Keys(
        k + kv_head * stride_kh, v + kv_head * stride_vh, Columns(k_desc, k_rest_desc if D > D_PAD else k_desc), v_desc,
        0, first_head // GROUP * STEP_K, first_head // GROUP * STEP_V,
        table + sequence.to(tl.int64) * stride_table, kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
    )  # fmt: skip
    m, total, acc = walk_keys(
        q_tile, limit, c, keys, begin, tl.minimum(begin + CHUNK, end), full_end,
        BLOCK_M, BLOCK_N, 0, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
    )  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()  # the merge kernel may start; it waits for this one to end before it reads states
    if kv_len <= CHUNK:
        value, lse_value = finish(m, total, acc, c)
        store_rows(out, lse, value, lse_value, row, head, valid, NUM_HEADS, DV, DV_PAD)
    else:
        part = (sequence.to(tl.int64) * num_chunks + chunk) * max_rows * NUM_HEADS
        flat = part + position * NUM_HEADS + head
        offs_dv = tl.arange(0, DV_PAD)
        mask = valid[:, None] & (offs_dv < DV)[None, :]
        tl.store(part_acc + flat[:, None] * DV + offs_dv[None, :], acc, mask=mask)
        tl.store(part_ml + flat * 2, m, mask=valid)
        tl.store(part_ml + flat * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["num_chunks", "max_rows"])
def merge_kernel(
    out, lse, part_acc, part_ml, cu_seqlens_q, kv_lengths, c, num_chunks, max_rows,
    NUM_HEADS: tl.constexpr, CHUNK: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, OVERLAP: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Merge the chunk states of one query row, first chunk first. A chunk past the end reads as an empty state: a
    no-op."""
    pid = tl.program_id(0)
    head = pid % NUM_HEADS
    position = pid // NUM_HEADS % max_rows
    sequence = pid // NUM_HEADS // max_rows
    q_start = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_start
    kv_len = tl.load(kv_lengths + sequence)
    if OVERLAP:
        gdc_wait()  # every program, also those without work: whoever waits for this kernel waits for the states, too
    if CHAINED:
        gdc_launch_dependents()
    if (position >= q_len) | (q_len > max_rows) | (kv_len <= CHUNK):
        return
    offs_dv = tl.arange(0, DV_PAD)[None, :]
    one = tl.arange(0, 1)
    used_chunks = tl.cdiv(kv_len, CHUNK)
    stride_chunk = max_rows.to(tl.int64) * NUM_HEADS
    first_part = sequence.to(tl.int64) * num_chunks * stride_chunk + position * NUM_HEADS + head
    m = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, DV_PAD), tl.float32)
    for chunk in tl.range(0, used_chunks, CHUNKS_IN_FLIGHT):
        for ahead in tl.static_range(CHUNKS_IN_FLIGHT):
            flat = first_part + (chunk + ahead) * stride_chunk + one
            here = (chunk + ahead + one) < used_chunks
            m_b = tl.load(part_ml + flat * 2, mask=here, other=float("-inf"))
            total_b = tl.load(part_ml + flat * 2 + 1, mask=here, other=0.0)
            mask = here[:, None] & (offs_dv < DV)
            acc_b = tl.load(part_acc + flat[:, None] * DV + offs_dv, mask=mask, other=0.0)
            m, total, acc = merge_states(m, total, acc, m_b, total_b, acc_b, c)
    value, lse_value = finish(m, total, acc, c)
    row = q_start + position + one
    store_rows(out, lse, value, lse_value, row, head + one, one == 0, NUM_HEADS, DV, DV_PAD)
