"""The arithmetic of attention: one online-softmax step, the merge of two partial states, and the final division.

Every forward path (packed, paged, prefill, decode) calls these functions and no other arithmetic, so a query row gets
the same bits from each of them. A state is `(m, total, acc)`: the largest raw score so far, the sum of `exp2((score -
m) * c)` and the sum of those weights times the value rows, where `c = softmax_scale * log2(e)`.

Three spellings make the bits independent of the tile shape and the thread layout; do not "simplify" them:

* `p = exp2(fma(s, c, -(m * c)))` for masked and unmasked blocks alike, so that the compiler has no contraction to
  choose;
* `alpha = exp2((m_old - m_new) * c)`, exactly 1 when the maximum stays, so that a block without visible keys changes
  nothing;
* the row sum is a matrix product with ones, because the order of `tl.sum` follows the thread layout. `total` is
  therefore kept as (BLOCK_M, ONES) with equal columns.

The recurrence is that of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), equations 7 to
9, with the block form of Dao, "FlashAttention-2" (2023), algorithm 1.
"""

import triton
import triton.language as tl

from vexact.ops.kernels.attention.columns import dot_columns

ONES = tl.constexpr(16)  # the narrowest matrix product every architecture takes
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, DV_PAD: tl.constexpr):
    """A state that has seen no key."""
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, ONES), tl.float32)
    acc = tl.zeros((BLOCK_M, DV_PAD), tl.float32)
    return m, total, acc


@triton.jit
def finite_or_zero(m):
    """`m` with -inf replaced by 0, so that a row without visible keys computes exp2(-inf) and not exp2(nan)."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def weigh(s, visible, m, c, MASKED: tl.constexpr):
    """(weights, m, alpha) of a block of scores s: exp2((s - m) * c), the new maximum, and the factor for what was
    summed before."""
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    m_ref = finite_or_zero(m_new)
    alpha = tl.math.exp2((m - m_ref) * c)
    return tl.math.exp2(tl.fma(s, c, (-(m_ref * c))[:, None])), m_new, alpha


@triton.jit
def softmax_step(
    q, k, v, ones, visible, m, total, acc, c, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Fold one block of keys into a state.

    q, k: Columns of BLOCK_M and of BLOCK_N rows; v (BLOCK_N, DV_PAD), ones (BLOCK_N, ONES) in the input dtype; visible
    (BLOCK_M, BLOCK_N) bool, read only if MASKED; c scalar fp32.
    """
    p, m_new, alpha = weigh(dot_columns(q, k, D, D_PAD), visible, m, c, MASKED)
    p = p.to(v.dtype)
    total = tl.dot(p, ones, total * alpha[:, None], input_precision="ieee")
    acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
    return m_new, total, acc


@triton.jit
def merge_states(m_a, total_a, acc_a, m_b, total_b, acc_b, c):
    """The state of the keys of `a` followed by the keys of `b`; totals are (BLOCK_M,) here."""
    m = tl.maximum(m_a, m_b)
    m_ref = finite_or_zero(m)
    scale_a = tl.math.exp2((m_a - m_ref) * c)
    scale_b = tl.math.exp2((m_b - m_ref) * c)
    acc = tl.fma(acc_a, scale_a[:, None], acc_b * scale_b[:, None])
    return m, tl.fma(total_a, scale_a, total_b * scale_b), acc


@triton.jit
def finish(m, total, acc, c):
    """(out, lse): the normalised rows in fp32 and the natural log-sum-exp; 0 and -inf for rows without visible keys.

    `total` is (BLOCK_M,). Zeros of the output are made positive: their sign would tell whether a state was merged
    with an empty one.
    """
    empty = total == 0.0
    inverse = tl.math.div_rn(1.0, tl.where(empty, 1.0, total))
    out = acc * inverse[:, None]
    out = tl.where(out == 0.0, 0.0, out)
    lse = tl.fma(finite_or_zero(m), c, tl.math.log2(tl.where(empty, 1.0, total))) * LN2
    return out, tl.where(empty, float("-inf"), lse)
