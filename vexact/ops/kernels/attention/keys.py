"""Where the keys and values of a sequence are, packed or in pages, and how a block of them is loaded."""

from typing import NamedTuple

import triton
import triton.language as tl

from vexact.ops.kernels.attention.columns import Columns, load_columns, load_tile


class Keys(NamedTuple):
    """Keys and values of one sequence and one key/value head, as a program of a kernel sees them."""

    k: tl.tensor  # pointer to the first packed row, or to the first page of the cache
    v: tl.tensor
    k_desc: Columns  # descriptors of all heads' rows (rows, columns), or anything if blocks go by pointers
    v_desc: tl.tensor
    first_row: tl.tensor  # of the sequence, if packed
    k_column: tl.tensor  # where the head begins in a described row
    v_column: tl.tensor
    table: tl.tensor  # pointer to the pages of the sequence, read only if paged
    length: tl.tensor
    stride_kp: tl.tensor  # elements from page to page
    stride_kt: tl.tensor  # and from row to row
    stride_vp: tl.tensor
    stride_vt: tl.tensor


@triton.jit
def page_numbers(keys, start, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Page of each key at start, start + 1, ..., or one number if a page holds the whole block; 0 past the end.

    Only entries that hold a key of the sequence are read.
    """
    if PAGE_SIZE == 0:
        page = 0
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(keys.table + start // PAGE_SIZE, mask=start < keys.length, other=0)
    else:
        offs_n = tl.arange(0, BLOCK_N)
        if BLOCK_N % PAGE_SIZE == 0:
            column = start // PAGE_SIZE + offs_n // PAGE_SIZE  # the second part stays the same from block to block
        else:
            column = (start + offs_n) // PAGE_SIZE
        page = tl.load(keys.table + column, mask=start + offs_n < keys.length, other=0)
    return page


@triton.jit
def load_by_pointers(
    keys, page, start,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns of BLOCK_N key rows, and value rows (BLOCK_N, DV_PAD), at positions start, start + 1, ...

    Rows past the end of the sequence are never dereferenced and read as 0; without MASKED there are none. Offsets that
    grow with the cache or the sequence are 64-bit.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_dv = tl.arange(0, DV_PAD)
    inside = start + offs_n < keys.length
    if PAGE_SIZE == 0:
        first = tl.cast(start, tl.int64)
        k_rows = keys.k + first * keys.stride_kt + offs_n[:, None] * keys.stride_kt
        v_rows = keys.v + first * keys.stride_vt + offs_n[:, None] * keys.stride_vt
    elif PAGE_SIZE % BLOCK_N == 0:
        slot = (start % PAGE_SIZE + offs_n)[:, None]
        k_rows = keys.k + page.to(tl.int64) * keys.stride_kp + slot * keys.stride_kt
        v_rows = keys.v + page.to(tl.int64) * keys.stride_vp + slot * keys.stride_vt
    else:
        slot = offs_n % PAGE_SIZE if BLOCK_N % PAGE_SIZE == 0 else (start + offs_n) % PAGE_SIZE
        k_rows = keys.k + (page.to(tl.int64) * keys.stride_kp + slot * keys.stride_kt)[:, None]
        v_rows = keys.v + (page.to(tl.int64) * keys.stride_vp + slot * keys.stride_vt)[:, None]
    k = load_columns(k_rows, inside, D, D_PAD, MASKED)
    v = load_tile(v_rows + offs_dv[None, :], inside, offs_dv, DV, DV_PAD, MASKED)
    return k, v


@triton.jit
def load_by_descriptors(
    keys, page, start, D: tl.constexpr, D_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """The same of a block that lies in the sequence and, if paged, in one page."""
    if PAGE_SIZE == 0:
        row = keys.first_row + start
    else:
        row = page * PAGE_SIZE + start % PAGE_SIZE
    first = keys.k_desc.first.load([row, keys.k_column])
    rest = first
    if D > D_PAD:
        rest = keys.k_desc.rest.load([row, keys.k_column + D_PAD])
    return Columns(first, rest), keys.v_desc.load([row, keys.v_column])
