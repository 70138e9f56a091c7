"""The loop over blocks and chunks of keys.

Blocks start at the absolute key positions 0, BLOCK_N, 2 * BLOCK_N, ...; chunks at 0, CHUNK, 2 * CHUNK, ... Those two
constants decide bits. Which program walks which chunk does not, nor how a block is loaded.
"""

import triton
import triton.language as tl

from vexact.ops.kernels.attention.keys import load_by_descriptors, load_by_pointers, page_numbers
from vexact.ops.kernels.attention.step import ONES, empty_state, merge_states, softmax_step


@triton.jit
def fold_block(
    q, ones, limit, m, total, acc, c, keys, page, start,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Load one block, fold it into the state and read the page numbers of the next; row r sees the keys below limit[r].

    Page numbers come one block ahead so that the pipeline of key and value loads never waits for one.
    """
    if DESCRIBED:
        k, v = load_by_descriptors(keys, page, start, D, D_PAD, PAGE_SIZE)
    else:
        k, v = load_by_pointers(keys, page, start, BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, MASKED)
    page = page_numbers(keys, start + BLOCK_N, BLOCK_N, PAGE_SIZE)
    visible = (start + tl.arange(0, BLOCK_N))[None, :] < limit[:, None]
    m, total, acc = softmax_step(q, k, v, ones, visible, m, total, acc, c, D, D_PAD, MASKED)
    return m, total, acc, page


@triton.jit
def walk_visible(
    q, ones, limit, m, total, acc, c, keys, begin, end,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Fold the blocks in [begin, end), all of one chunk and visible to every row, into its state."""
    page = page_numbers(keys, begin, BLOCK_N, PAGE_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        m, total, acc, page = fold_block(
            q, ones, limit, m, total, acc, c, keys, page, start,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, False, DESCRIBED,
        )  # fmt: skip
    return m, total, acc


@triton.jit
def walk_keys(
    q, limit, c, keys, begin, end, full_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """The state of the keys in [begin, end), its total as (BLOCK_M,), chunks merged in order.

    CHUNK 0 promises that the keys lie in one chunk; otherwise begin is 0. Blocks below `full_end` are visible to
    every row and skip the mask, which changes no bit; DESCRIBED loads them through descriptors. Chunks wholly below it
    have a loop of their own: a branch for the merge in the loop over blocks keeps the tensor cores from running ahead
    (measured: 20 % on an H100).
    """
    ones = tl.full((BLOCK_N, ONES), 1.0, q.first.dtype)
    middle = tl.minimum(tl.maximum(full_end, begin), end)
    m, total, acc = empty_state(BLOCK_M, DV_PAD)
    if CHUNK > 0:
        m_run, total_run, acc_run = m, tl.max(total, 1), acc
        for first in tl.range(0, middle, CHUNK):
            m_run, total_run, acc_run = merge_states(m_run, total_run, acc_run, m, tl.max(total, 1), acc, c)
            m, total, acc = empty_state(BLOCK_M, DV_PAD)
            m, total, acc = walk_visible(
                q, ones, limit, m, total, acc, c, keys, first, tl.minimum(first + CHUNK, middle),
                BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
            )  # fmt: skip
    else:
        m, total, acc = walk_visible(
            q, ones, limit, m, total, acc, c, keys, begin, middle,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, DESCRIBED,
        )  # fmt: skip
    page = page_numbers(keys, middle, BLOCK_N, PAGE_SIZE)
    for start in tl.range(middle, end, BLOCK_N):
        if CHUNK > 0:  # noqa: SIM102 - a compile-time branch: nothing may be divided by 0
            if start % CHUNK == 0:
                m_run, total_run, acc_run = merge_states(m_run, total_run, acc_run, m, tl.max(total, 1), acc, c)
                m, total, acc = empty_state(BLOCK_M, DV_PAD)
        m, total, acc, page = fold_block(
            q, ones, limit, m, total, acc, c, keys, page, start,
            BLOCK_N, D, DV, D_PAD, DV_PAD, PAGE_SIZE, True, False,
        )  # fmt: skip
    row_total = tl.max(total, 1)
    if CHUNK > 0:
        m, row_total, acc = merge_states(m_run, total_run, acc_run, m, row_total, acc, c)
    return m, row_total, acc
