"""The products of the backward: scores and their gradients, sums over them, and how a finished sum is written."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vexact.ops.kernels.attention.columns import Columns
from vexact.ops.kernels.attention.hopper.loading import first_width, rest_width
from vexact.ops.kernels.attention.hopper.shared import ROWS
from vexact.ops.kernels.attention.hopper.stores import store_columns
from vexact.ops.kernels.attention.hopper.weights import accumulator, as_left_operand


@gluon.constexpr_function
def products(width):
    """How many products of the tensor cores a product with rows so wide is."""
    return 2 if rest_width(width) > 0 else 1


@gluon.jit
def start_product(own, other, COLUMNS: gl.constexpr):
    """Start own other^T, (ROWS, COLUMNS), of tiles in shared memory."""
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, accumulator(COLUMNS))
    return warpgroup_mma(own, other.permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def start_scores(own, other, COLUMNS: gl.constexpr, D: gl.constexpr):
    """The same of rows in one or two tiles: one sum over all columns, in order."""
    scores = start_product(own.first, other.first, COLUMNS)
    if rest_width(D) > 0:
        scores = warpgroup_mma(own.rest, other.rest.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def exponents(scores, minus_lse, c):
    """Of the weights, to the base of 2, as `attention/backward.py` rounds them."""
    return gl.fma(scores, c, minus_lse)


@gluon.jit
def zero_sums(D: gl.constexpr):
    """Accumulators of ROWS rows."""
    first = gl.zeros([ROWS, first_width(D)], gl.float32, accumulator(first_width(D)))
    rest = first
    if rest_width(D) > 0:
        rest = gl.zeros([ROWS, rest_width(D)], gl.float32, accumulator(rest_width(D)))
    return Columns(first, rest)


@gluon.jit
def left_of(factors, COLUMNS: gl.constexpr):
    """Factors as the left operand of a product with so many columns; no data moves."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator(COLUMNS), 2)
    return gl.convert_layout(factors, layout, assert_trivial=True)


@gluon.jit
def start_sums(factors, rows, sums, D: gl.constexpr):
    """Start adding factors rows to the sums."""
    first = warpgroup_mma(left_of(factors, first_width(D)), rows.first, sums.first, is_async=True)
    rest = sums.rest
    if rest_width(D) > 0:
        rest = warpgroup_mma(left_of(factors, rest_width(D)), rows.rest, sums.rest, is_async=True)
    return Columns(first, rest)


@gluon.jit
def wait_sums(sums, factors, OUTSTANDING: gl.constexpr, D: gl.constexpr):
    """The sums, once all but the last OUTSTANDING products are done; their left operand is held until then."""
    if rest_width(D) > 0:
        first, rest, _ = warpgroup_mma_wait(OUTSTANDING, deps=[sums.first, sums.rest, factors])
    else:
        first, _ = warpgroup_mma_wait(OUTSTANDING, deps=[sums.first, factors])
        rest = first
    return Columns(first, rest)


@gluon.jit
def as_factors(product, dtype: gl.constexpr):
    """A product, rounded, as left operand; no data moves."""
    return as_left_operand(product.to(dtype), 64)


@gluon.jit
def store_gradient(
    target, staging, sums, scale, start, first, head, length, HEADS: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """Write finished sums, times scale, to the rows from `first` on that lie in a sequence (start, length) of target
    (rows, HEADS, WIDTH). `staging`: tiles that nobody reads any more; they may be loaded again afterwards."""
    FIRST: gl.constexpr = first_width(WIDTH)
    REST: gl.constexpr = rest_width(WIDTH)
    value = sums.first * scale
    store_columns(target, staging.first, value, start, first, head, length, HEADS, WIDTH, 0, FIRST)
    if REST > 0:
        value = sums.rest * scale
        store_columns(target, staging.rest, value, start, first, head, length, HEADS, WIDTH, FIRST, REST)
    fence_async_shared()
