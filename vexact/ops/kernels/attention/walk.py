"""Walking the keys of a sequence: block addresses (packed or paged) and the loop over blocks and chunks.

Blocks start at the absolute key positions 0, BLOCK_N, 2 * BLOCK_N, ...; chunks at 0, CHUNK, 2 * CHUNK, ... Those two
constants decide bits. Which program walks which chunk does not.
"""

import triton
import triton.language as tl

from vexact.ops.kernels.attention.step import ONES, empty_state, merge_states, softmax_step


@triton.jit
def load_tile(pointers, row_mask, offs_d, D: tl.constexpr, D_PAD: tl.constexpr, MASK_ROWS: tl.constexpr):
    """A (rows, D_PAD) tile; rows outside `row_mask` and columns past D read as 0."""
    if MASK_ROWS:
        if D == D_PAD:
            tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=row_mask[:, None] & (offs_d < D)[None, :], other=0.0)
    else:
        if D == D_PAD:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def page_numbers(table, start, kv_len, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page of each key at start, start + 1, ..., or one number if a page holds the whole block; 0 from `kv_len` on.

    Only entries that hold a key below `kv_len` are read.
    """
    if PAGE_SIZE == 0:
        page = 0
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table + start // PAGE_SIZE, mask=start < kv_len, other=0)
    else:
        offs_n = tl.arange(0, BLOCK_N)
        if BLOCK_N % PAGE_SIZE == 0:
            column = start // PAGE_SIZE + offs_n // PAGE_SIZE  # the second part stays the same from block to block
        else:
            column = (start + offs_n) // PAGE_SIZE
        page = tl.load(table + column, mask=start + offs_n < kv_len, other=0)
    return page


@triton.jit
def load_keys(
    k_base, v_base, page, start, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Key rows (BLOCK_N, D_PAD) and value rows (BLOCK_N, DV_PAD) at positions start, start + 1, ...

    Rows at or past `kv_len` are never dereferenced and read as 0. PAGE_SIZE 0 means packed rows. Offsets that grow with
    the cache or the sequence are 64-bit.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D_PAD)
    offs_dv = tl.arange(0, DV_PAD)
    inside = start + offs_n < kv_len
    if PAGE_SIZE == 0:
        first = tl.cast(start, tl.int64)
        k_rows = k_base + first * stride_kt + offs_n[:, None] * stride_kt
        v_rows = v_base + first * stride_vt + offs_n[:, None] * stride_vt
    elif PAGE_SIZE % BLOCK_N == 0:
        slot = (start % PAGE_SIZE + offs_n)[:, None]
        k_rows = k_base + page.to(tl.int64) * stride_kp + slot * stride_kt
        v_rows = v_base + page.to(tl.int64) * stride_vp + slot * stride_vt
    else:
        slot = offs_n % PAGE_SIZE if BLOCK_N % PAGE_SIZE == 0 else (start + offs_n) % PAGE_SIZE
        k_rows = k_base + (page.to(tl.int64) * stride_kp + slot * stride_kt)[:, None]
        v_rows = v_base + (page.to(tl.int64) * stride_vp + slot * stride_vt)[:, None]
    k = load_tile(k_rows + offs_d[None, :], inside, offs_d, D, D_PAD, MASKED)
    v = load_tile(v_rows + offs_dv[None, :], inside, offs_dv, DV, DV_PAD, MASKED)
    return k, v


@triton.jit
def described_row(page, first_row, start, PAGE_SIZE: tl.constexpr):
    """Row of a block of keys in the view (rows, heads * D) that descriptors have of packed rows or of a cache."""
    if PAGE_SIZE == 0:
        row = first_row + start
    else:
        row = page * PAGE_SIZE + start % PAGE_SIZE
    return row


@triton.jit
def fold_block(
    q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table, page, start, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load one block, fold it into the state and read the page numbers of the next; row r sees the keys below limit[r].

    Page numbers come one block ahead so that the pipeline of key and value loads never waits for one.
    """
    if DESCRIBED:
        row = described_row(page, first_row, start, PAGE_SIZE)
        k, v = k_desc.load([row, kv_head * D]), v_desc.load([row, kv_head * DV])
    else:
        k, v = load_keys(
            k_base, v_base, page, start, kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, MASKED,
        )  # fmt: skip
    page = page_numbers(table, start + BLOCK_N, kv_len, BLOCK_N, PAGE_SIZE)
    visible = (start + tl.arange(0, BLOCK_N))[None, :] < limit[:, None]
    m, total, acc = softmax_step(q, k, v, ones, visible, m, total, acc, c, MASKED)
    return m, total, acc, page


@triton.jit
def walk_visible(
    q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table, begin, end, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Fold the blocks in [begin, end), all of one chunk and visible to every row, into its state."""
    page = page_numbers(table, begin, kv_len, BLOCK_N, PAGE_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        m, total, acc, page = fold_block(
            q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table, page, start,
            kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, False, DESCRIBED,
        )  # fmt: skip
    return m, total, acc


@triton.jit
def walk_keys(
    q, limit, c,
    k_base, v_base, k_desc, v_desc, first_row, kv_head, table, begin, end, full_end, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The state of the keys in [begin, end), its total as (BLOCK_M,), chunks merged in order.

    CHUNK 0 promises that the keys lie in one chunk; otherwise begin is 0. Blocks below `full_end` are visible to
    every row and skip the mask, which changes no bit. Chunks wholly below it have a loop of their own: a branch for
    the merge in the loop over blocks keeps the tensor cores from running ahead (measured: 20 % on an H100).
    """
    ones = tl.full((BLOCK_N, ONES), 1.0, q.dtype)
    middle = tl.minimum(tl.maximum(full_end, begin), end)
    m, total, acc = empty_state(BLOCK_M, DV_PAD)
    if CHUNK > 0:
        m_run, total_run, acc_run = m, tl.max(total, 1), acc
        for first in tl.range(0, middle, CHUNK):
            m_run, total_run, acc_run = merge_states(m_run, total_run, acc_run, m, tl.max(total, 1), acc, c)
            m, total, acc = empty_state(BLOCK_M, DV_PAD)
            m, total, acc = walk_visible(
                q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table,
                first, tl.minimum(first + CHUNK, middle), kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
                BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
            )  # fmt: skip
    else:
        m, total, acc = walk_visible(
            q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table,
            begin, middle, kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
        )  # fmt: skip
    page = page_numbers(table, middle, kv_len, BLOCK_N, PAGE_SIZE)
    for start in tl.range(middle, end, BLOCK_N):
        if CHUNK > 0:  # noqa: SIM102 - a compile-time branch: nothing may be divided by 0
            if start % CHUNK == 0:
                m_run, total_run, acc_run = merge_states(m_run, total_run, acc_run, m, tl.max(total, 1), acc, c)
                m, total, acc = empty_state(BLOCK_M, DV_PAD)
        m, total, acc, page = fold_block(
            q, ones, limit, m, total, acc, c, k_base, v_base, k_desc, v_desc, first_row, kv_head, table, page, start,
            kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, True, False,
        )  # fmt: skip
    row_total = tl.max(total, 1)
    if CHUNK > 0:
        m, row_total, acc = merge_states(m_run, total_run, acc_run, m, row_total, acc, c)
    return m, row_total, acc
