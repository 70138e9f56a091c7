"""The steps of routing on a tile of rows: scores, the order in which experts are chosen, the choice.

Every addition is between two named elements or in the order of the experts, so that a CPU can repeat it; kernels that
use these are launched with ``enable_fp_fusion=False``. Columns are padded to powers of two, group by group: column c
is member c % SIZE of group c // SIZE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.logprob import pair_sum_columns
from vexact.ops.kernels.sampling.portable_math import exp_of_negative

LEFT_OUT = tl.constexpr(-(2**63))  # below every key


@triton.jit
def exponential(z):
    """e^z for z <= 0, 0 below -87; NaN for NaN."""
    value = tl.where(z < -87.0, 0.0, exp_of_negative(z))
    return tl.where(z == z, value, z)


@triton.jit
def load_logits(logits_ptr, rows, num_tokens, index, known, E: tl.constexpr):
    """(R, C) fp32, -inf where there is nothing."""
    ptrs = logits_ptr + rows.to(tl.int64)[:, None] * E + index[None, :]
    return tl.load(ptrs, mask=(rows < num_tokens)[:, None] & known[None, :], other=float("-inf"))


@triton.jit
def softmax_terms(logits_ptr, rows, num_tokens, E: tl.constexpr, LEVELS: tl.constexpr):
    """Maximum and sum of exponentials of whole rows, (R, 1) each; the columns' order decides the sum's bits."""
    columns = tl.arange(0, 1 << LEVELS)
    logits = load_logits(logits_ptr, rows, num_tokens, columns, columns < E, E)
    top = tl.max(logits, 1)[:, None]
    terms = tl.where((columns < E)[None, :], exponential(logits - top), 0.0)
    return top, pair_sum_columns(terms, LEVELS)[:, None]


@triton.jit
def scores_of(logits_ptr, rows, num_tokens, index, known, E: tl.constexpr, LEVELS: tl.constexpr, SIGMOID: tl.constexpr):
    """(R, C) fp32 scores of the experts ``index``: softmax over the row, or sigmoid."""
    logits = load_logits(logits_ptr, rows, num_tokens, index, known, E)
    if SIGMOID:
        small = exponential(-tl.abs(logits))
        return tl.div_rn(tl.where(logits < 0.0, small, 1.0), 1.0 + small)
    else:
        top, total = softmax_terms(logits_ptr, rows, num_tokens, E, LEVELS)
        return tl.div_rn(exponential(logits - top), tl.broadcast_to(total, logits.shape))


@triton.jit
def order_key(values):
    """int64 in the range of int32 that orders as fp32 values do: -0 is +0, and NaN comes last of all."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values == values, key, 0x7FFFFFFF).to(tl.int64)


@triton.jit
def value_of_order(order, BOUND: tl.constexpr):
    """The fp32 value whose key stands above 32 bits from which an index below BOUND was subtracted."""
    key = ((order + BOUND) >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def take_largest(order):
    """(R, N) distinct int64 -> (R, 1) largest, and ``order`` without it."""
    best = tl.max(order, 1)[:, None]
    return best, tl.where(order == best, LEFT_OUT, order)


@triton.jit
def largest(order, COUNT: tl.constexpr):
    """(R, N) distinct int64 -> (R, N), whether each is among the COUNT largest."""
    chosen = order < order
    for _ in tl.static_range(COUNT):
        best, rest = take_largest(order)
        chosen = chosen | (order == best)
        order = rest
    return chosen


@triton.jit
def in_best_groups(
    order, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, BEST: tl.constexpr
):
    """(R, GROUPS * SIZE) -> the same, whether an expert's group is among the TOP_GROUPS best, equal ones by index.

    A group's value is that of its best expert, or with BEST = 2 the sum of its two best.
    """
    first, rest = take_largest(tl.reshape(order, (ROWS * GROUPS, SIZE)))
    value = value_of_order(first, GROUPS * SIZE)
    if BEST == 2:
        second, _ = take_largest(rest)
        value += value_of_order(second, GROUPS * SIZE)
    padded = tl.reshape(first, (ROWS, GROUPS)) == LEFT_OUT
    keys = order_key(tl.reshape(value, (ROWS, GROUPS))) << 32
    chosen = largest(tl.where(padded, LEFT_OUT, keys - tl.arange(0, GROUPS).to(tl.int64)[None, :]), TOP_GROUPS)
    wide = tl.broadcast_to(chosen.to(tl.int32)[:, :, None], (ROWS, GROUPS, SIZE))
    return tl.reshape(wide, (ROWS, GROUPS * SIZE)) != 0


@triton.jit
def mixed(x):
    """The finaliser of MurmurHash3 on int64; its shifts fill with zeros."""
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -49064778989728563
    x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * -4265267296055464877
    return x ^ ((x >> 33) & 0x7FFFFFFF)
