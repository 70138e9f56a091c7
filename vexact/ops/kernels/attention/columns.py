"""Rows of queries and keys, which may be wider than one tile.

A tile is a power of two wide. Rows that are D wide come in a tile of D_PAD columns and, where D is more than that, the
rest in a second one; 192 columns are 128 and 64 rather than 256.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Columns(NamedTuple):
    """Rows of queries or keys, their gradients, or descriptors of them."""

    first: tl.tensor  # D_PAD columns
    rest: tl.tensor  # those from D_PAD on; where there are none the same as `first`, and never read


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


@triton.constexpr_function
def rest_width(D, D_PAD):
    """Width of the second tile, 0 if the first holds all columns."""
    return max(16, 1 << (D - D_PAD - 1).bit_length()) if D > D_PAD else 0


@triton.jit
def load_columns(rows, row_mask, D: tl.constexpr, D_PAD: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Rows that start at the pointers (rows, 1); see `load_tile`."""
    REST: tl.constexpr = rest_width(D, D_PAD)
    FIRST: tl.constexpr = D if REST == 0 else D_PAD
    offs_d = tl.arange(0, D_PAD)
    first = load_tile(rows + offs_d[None, :], row_mask, offs_d, FIRST, D_PAD, MASK_ROWS)
    rest = first
    if REST > 0:
        offs_rest = tl.arange(0, REST)
        rest = load_tile(rows + D_PAD + offs_rest[None, :], row_mask, offs_rest, D - D_PAD, REST, MASK_ROWS)
    return Columns(first, rest)


@triton.jit
def dot_columns(a, b, D: tl.constexpr, D_PAD: tl.constexpr):
    """a b^T in fp32: one sum over all columns, in order."""
    product = tl.dot(a.first, tl.trans(b.first), input_precision="ieee")
    if D > D_PAD:
        product = tl.dot(a.rest, tl.trans(b.rest), product, input_precision="ieee")
    return product


@triton.jit
def zero_columns(ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Accumulators of a gradient of this many rows."""
    REST: tl.constexpr = rest_width(D, D_PAD)
    first = tl.zeros((ROWS, D_PAD), tl.float32)
    rest = first
    if REST > 0:
        rest = tl.zeros((ROWS, REST), tl.float32)
    return Columns(first, rest)


@triton.jit
def store_columns(target, rows, inside, gradient, scale, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write accumulators, times scale, to the rows of target that start at the offsets `rows` (rows, 1)."""
    offs_d = tl.arange(0, D_PAD)
    value = (gradient.first * scale).to(target.dtype.element_ty)
    tl.store(target + rows + offs_d[None, :], value, mask=inside[:, None] & (offs_d < D)[None, :])
    if D > D_PAD:
        offs_rest = D_PAD + tl.arange(0, rest_width(D, D_PAD))
        value = (gradient.rest * scale).to(target.dtype.element_ty)
        tl.store(target + rows + offs_rest[None, :], value, mask=inside[:, None] & (offs_rest < D)[None, :])
