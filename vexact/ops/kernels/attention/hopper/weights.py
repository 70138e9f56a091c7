"""The arithmetic of `attention/step.py` on the registers of a warp group, and its matrix products."""

from typing import NamedTuple

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from vexact.ops.kernels.attention import step
from vexact.ops.kernels.attention.hopper.shared import ONES, ROWS

weigh = gluon.jit(step.weigh.fn)
merge_states = gluon.jit(step.merge_states.fn)
finish = gluon.jit(step.finish.fn)


@gluon.constexpr_function
def accumulator(columns):
    """Layout of a (ROWS, columns) product of a warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def along_rows(vector, columns: gl.constexpr):
    """A value for each row, as a factor of a (ROWS, columns) product; no data moves."""
    return gl.convert_layout(vector, gl.SliceLayout(1, accumulator(columns)), assert_trivial=True)[:, None]


@gluon.jit
def as_left_operand(product, columns: gl.constexpr):
    """A product, rounded, as the left operand of one with so many columns; no data moves."""
    return gl.convert_layout(product, gl.DotOperandLayout(0, accumulator(columns), 2), assert_trivial=True)


@gluon.jit
def rescale(acc, total, alpha, DV: gl.constexpr):
    """Both sums times alpha (ROWS,)."""
    return acc * along_rows(alpha, DV), total * along_rows(alpha, ONES)


@gluon.jit
def row_sums(total, columns: gl.constexpr):
    """The (ROWS,) sums of which `total` has ONES equal copies, in the layout of the rows of a product."""
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(columns))
    return gl.convert_layout(gl.max(total, 1), layout, assert_trivial=True)


@gluon.jit
def weigh_block(
    s, start, limit, m, c, dtype: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr
):
    """(weights as left operand of a product, m, alpha) of the keys at start, start + 1, ...; see `step.weigh`."""
    keys = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, accumulator(BLOCK_N)))
    p, m, alpha = weigh(s, keys[None, :] < limit[:, None], m, c, MASKED)
    return as_left_operand(p.to(dtype), DV), m, alpha


@gluon.jit
def multiply_keys(q, k, TILE_N: gl.constexpr):
    """Start the scores (ROWS, TILE_N) of a tile of keys."""
    nothing = gl.zeros([ROWS, TILE_N], gl.float32, accumulator(TILE_N))
    return warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def add_values(p, v, ones, acc, total):
    """Start adding the weighted values to acc, and the weights to total: two products, in this order."""
    acc = warpgroup_mma(p, v, acc, is_async=True)
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator(ONES), 2)
    total = warpgroup_mma(gl.convert_layout(p, operand, assert_trivial=True), ones, total, is_async=True)
    return acc, total


@gluon.jit
def halves(s, TILE_N: gl.constexpr):
    """The scores of the first and of the second block of keys of a tile; no data moves."""
    HALF: gl.constexpr = TILE_N // 2
    first, second = s.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()
    layout: gl.constexpr = accumulator(HALF)
    first = gl.convert_layout(first, layout, assert_trivial=True)
    return first, gl.convert_layout(second, layout, assert_trivial=True)


class Weights(NamedTuple):
    """Weights of one tile of keys, as left operands (ROWS, BLOCK_N)."""

    first: tl.tensor
    second: tl.tensor  # of the second block; where a tile is one block the same as `first`, and never read
    between: tl.tensor  # the factor for the sums before the second block is added


@gluon.jit
def weigh_tile(
    s, start, limit, m, c,
    dtype: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(Weights, m, alpha) of the scores of one tile, whose first key is `start`; alpha is for the sums up to it."""
    if TILE_N == BLOCK_N:
        first, m, alpha = weigh_block(s, start, limit, m, c, dtype, DV, BLOCK_N, MASKED)
        second, between = first, alpha
    else:
        s_first, s_second = halves(s, TILE_N)
        first, m, alpha = weigh_block(s_first, start, limit, m, c, dtype, DV, BLOCK_N, MASKED)
        second, m, between = weigh_block(s_second, start + BLOCK_N, limit, m, c, dtype, DV, BLOCK_N, MASKED)
    return Weights(first, second, between), m, alpha
