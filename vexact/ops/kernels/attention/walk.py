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
def load_keys(
    k_base, v_base, table, start, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Key rows (BLOCK_N, D_PAD) and value rows (BLOCK_N, DV_PAD) at positions start, start + 1, ...

    Rows at or past `kv_len` are never dereferenced (nor are their page numbers) and read as 0. PAGE_SIZE 0 means packed
    rows. Offsets that grow with the cache or the sequence are 64-bit.
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
        page = tl.load(table + start // PAGE_SIZE).to(tl.int64)
        k_rows = k_base + page * stride_kp + (start % PAGE_SIZE + offs_n)[:, None] * stride_kt
        v_rows = v_base + page * stride_vp + (start % PAGE_SIZE + offs_n)[:, None] * stride_vt
    else:
        position = start + offs_n
        if MASKED:
            page = tl.load(table + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            page = tl.load(table + position // PAGE_SIZE).to(tl.int64)
        k_rows = k_base + (page * stride_kp + (position % PAGE_SIZE) * stride_kt)[:, None]
        v_rows = v_base + (page * stride_vp + (position % PAGE_SIZE) * stride_vt)[:, None]
    k = load_tile(k_rows + offs_d[None, :], inside, offs_d, D, D_PAD, MASKED)
    v = load_tile(v_rows + offs_dv[None, :], inside, offs_dv, DV, DV_PAD, MASKED)
    return k, v


@triton.jit
def walk_blocks(
    q, ones, limit, m, total, acc, m_run, total_run, acc_run, c,
    k_base, v_base, table, begin, end, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the blocks that start in [begin, end) into the chunk's state; row r sees the keys below limit[r].

    Where a chunk begins, the finished one goes to the running state. CHUNK 0: the caller stays inside one chunk.
    The merge stands at the top of the loop body: at its end, ptxas would wait after every tensor-core instruction.
    """
    for start in tl.range(begin, end, BLOCK_N):
        if CHUNK > 0:
            if start % CHUNK == 0:
                m_run, total_run, acc_run = merge_states(m_run, total_run, acc_run, m, total, acc, c)
                m, total, acc = empty_state(acc.shape[0], DV_PAD)
        k, v = load_keys(
            k_base, v_base, table, start, kv_len, stride_kp, stride_kt, stride_vp, stride_vt,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, MASKED,
        )  # fmt: skip
        visible = (start + tl.arange(0, BLOCK_N))[None, :] < limit[:, None]
        m, total, acc = softmax_step(q, k, v, ones, visible, m, total, acc, c, MASKED)
    return m, total, acc, m_run, total_run, acc_run


@triton.jit
def walk_keys(
    q, limit, c,
    k_base, v_base, table, begin, end, full_end, kv_len,
    stride_kp, stride_kt, stride_vp, stride_vt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """The state of the keys in [begin, end), chunks merged in order; CHUNK 0 promises that they lie in one chunk.

    Blocks that start below `full_end` are visible to every row and skip the mask, which changes no bit.
    """
    ones = tl.full((BLOCK_N, ONES), 1.0, q.dtype)
    middle = tl.minimum(tl.maximum(full_end, begin), end)
    m, total, acc = empty_state(BLOCK_M, DV_PAD)
    m_run, total_run, acc_run = empty_state(BLOCK_M, DV_PAD)
    m, total, acc, m_run, total_run, acc_run = walk_blocks(
        q, ones, limit, m, total, acc, m_run, total_run, acc_run, c, k_base, v_base, table, begin, middle, kv_len,
        stride_kp, stride_kt, stride_vp, stride_vt, BLOCK_N, CHUNK, D, DV, D_PAD, DV_PAD, PAGE_SIZE, False,
    )  # fmt: skip
    m, total, acc, m_run, total_run, acc_run = walk_blocks(
        q, ones, limit, m, total, acc, m_run, total_run, acc_run, c, k_base, v_base, table, middle, end, kv_len,
        stride_kp, stride_kt, stride_vp, stride_vt, BLOCK_N, CHUNK, D, DV, D_PAD, DV_PAD, PAGE_SIZE, True,
    )  # fmt: skip
    if CHUNK > 0:
        m, total, acc = merge_states(m_run, total_run, acc_run, m, total, acc, c)
    return m, total, acc
