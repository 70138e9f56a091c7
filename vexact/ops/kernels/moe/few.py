"""A layer of experts for a few tokens in two launches: routes with the gated product, the other product with the sum.

Nothing is grouped: a program of the first kernel takes one pair of token and expert, one of the second the same columns
of all experts of a token. Each routes its token again from the logits, which takes less than to wait for a kernel that
does, and the second knows its matrices before the first has ended. The bits are those of ``router``,
``grouped_linear`` and ``combine``: K in order, the same roundings, experts added by index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vexact.ops.kernels.chain import overlapping
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.linear.tma import halves
from vexact.ops.kernels.moe.epilogue import gated
from vexact.ops.kernels.moe.router import add_to_digest, choose, constants
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

TOKENS = 4  # more of them share experts, whose matrices would be read more than once
UNASKED = 2  # layers take these kernels for up to so many: with more, the operators one by one are faster on an H100
WARPS = 4  # each routes the program's token, so that no reduction leaves a warp
ROWS = 16  # of a tensor core's tile: of the first product one is a token's, of the second as many as it has experts
# Columns of gate and of up, depth, stages; columns of all experts of a token together, depth, stages. The first of each
# is taken; the others are candidates of benchmarks/moe/few.py.
GATED_TILES = ((32, 128, 4), (32, 64, 6), (64, 128, 3), (32, 256, 3), (16, 128, 4))
DOWN_TILES = ((128, 128, 4), (128, 64, 6), (64, 128, 4), (128, 256, 2), (256, 64, 4))


@triton.jit
def of_columns(values, chosen, position, TOP_K: tl.constexpr, EXPERTS: tl.constexpr):
    """(EXPERTS,) int32 values of the chosen columns in order, where all rows are one token; 0 behind them."""
    number = tl.arange(0, EXPERTS)[None, :]
    table = tl.zeros((values.shape[0], EXPERTS), tl.int32)
    for j in tl.static_range(TOP_K):
        one = tl.sum(tl.where(chosen & (position == j), values, 0), 1)
        table = tl.where(number == j, one[:, None], table)
    return tl.max(table, 0)


@triton.jit
def multiply(w_ptrs, x_ptrs, in_w, in_x, K, acc, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """acc + w @ xᵀ of (M, BLOCK_K) and (ROWS, BLOCK_K) tiles that move along K."""
    depth = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        within = (depth < K - start)[None, :]
        w = tl.load(w_ptrs, mask=in_w if EVEN_K else in_w & within, other=0.0)
        x = tl.load(x_ptrs, mask=in_x if EVEN_K else in_x & within, other=0.0)
        acc = tl.dot(w, tl.trans(x), acc)
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["num_tokens", "salt"])
def few_gated_kernel(
    logits_ptr,  # (T, E) fp32
    bias_ptr,  # (E,) fp32
    digest_ptr,  # (T,) int64
    padding_ptr,  # (T,) bool
    x_ptr,  # (T, K)
    weight_ptr,  # (E, 2 * N, K)
    act_ptr,  # (T * TOP_K, N)
    num_tokens,
    scale,
    salt,
    N,
    K,
    E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DIGEST: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """SwiGLU of BLOCK_N columns of one pair. The first program of a token adds to its digest."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()  # after the wait: what the kernel before this one wrote, the next one may read at once
    pair, block = tl.program_id(0), tl.program_id(1)
    token, j = pair // TOP_K, pair % TOP_K
    rows = token + tl.zeros((WARPS,), tl.int32)
    chosen, position, _, index, _, state = choose(
        logits_ptr, bias_ptr, rows, num_tokens, scale, salt, E, NUM_GROUPS, LEVELS, GROUPS, SIZE, TOP_GROUPS, BEST,
        TOP_K, WARPS, SIGMOID, NORMALIZE, ROUND_TO, HAS_BIAS, HAS_DIGEST,
    )  # fmt: skip
    if HAS_DIGEST:
        add_to_digest(digest_ptr, rows, state, (tl.arange(0, WARPS) == 0) & (j == 0) & (block == 0))
    deep = K
    if HAS_PADDING:
        deep = tl.where(tl.load(padding_ptr + token) == 0, K, 0)
    expert = tl.max(tl.sum(tl.where(chosen & (position == j), index[None, :], 0), 1), 0)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    within = tl.arange(0, 2 * BLOCK_N) % BLOCK_N
    cols = block * BLOCK_N + within + tl.arange(0, 2 * BLOCK_N) // BLOCK_N * N  # of up after those of the gate
    in_cols = (block * BLOCK_N + within < N)[:, None]
    w_ptrs = weight_ptr + expert.to(tl.int64) * (2 * N * K) + cols.to(tl.int64)[:, None] * K + depth[None, :]
    first = (tl.arange(0, ROWS) == 0)[:, None]
    x_ptrs = x_ptr + token.to(tl.int64) * K + tl.zeros((ROWS, 1), tl.int64) + depth[None, :]
    acc = tl.zeros((2 * BLOCK_N, ROWS), tl.float32)
    acc = multiply(w_ptrs, x_ptrs, in_cols, first, deep, acc, BLOCK_K, EVEN_K)
    gate, up = halves(tl.trans(acc))
    act = gated(gate, up, act_ptr.dtype.element_ty)
    out = block * BLOCK_N + tl.arange(0, BLOCK_N)
    act_ptrs = act_ptr + pair.to(tl.int64) * N + tl.zeros((ROWS, 1), tl.int64) + out[None, :]
    tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=first & (out < N)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "salt"])
def few_down_kernel(
    logits_ptr,  # (T, E) fp32
    bias_ptr,  # (E,) fp32
    padding_ptr,  # (T,) bool
    act_ptr,  # (T * TOP_K, K)
    weight_ptr,  # (E, N, K)
    shared_ptr,  # (T, N)
    out_ptr,  # (T, N)
    num_tokens,
    scale,
    salt,
    N,
    K,
    E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DIGEST: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,  # TOP_K or the next power of two
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """WIDTH columns of one token: one tile holds these columns of all its experts, each times the rows of all pairs, of
    which its own is kept; then they are added by index.

    It may read the logits before it waits: it starts when every program of the first kernel has let it, which each does
    after its own wait, so whoever wrote them has ended.
    """
    block, token = tl.program_id(0), tl.program_id(1)
    rows = token + tl.zeros((WARPS,), tl.int32)
    chosen, position, weights, index, _, _ = choose(
        logits_ptr, bias_ptr, rows, num_tokens, scale, salt, E, NUM_GROUPS, LEVELS, GROUPS, SIZE, TOP_GROUPS, BEST,
        TOP_K, WARPS, SIGMOID, NORMALIZE, ROUND_TO, HAS_BIAS, False,
    )  # fmt: skip
    numbers = tl.arange(0, EXPERTS)
    experts = of_columns(tl.broadcast_to(index[None, :], chosen.shape), chosen, position, TOP_K, EXPERTS)
    weights = of_columns(weights.to(tl.int32, bitcast=True), chosen, position, TOP_K, EXPERTS)
    number = tl.arange(0, EXPERTS * WIDTH) // WIDTH
    expert = tl.reshape(tl.broadcast_to(experts[:, None], (EXPERTS, WIDTH)), (EXPERTS * WIDTH,)).to(tl.int64)
    depth = tl.arange(0, BLOCK_K).to(tl.int64)
    cols = block * WIDTH + tl.arange(0, EXPERTS * WIDTH) % WIDTH
    in_w = (number < TOP_K) & (cols < N)
    w_rows = weight_ptr + (expert * N + tl.minimum(cols, N - 1)) * K
    taken = token >= 0
    if HAS_PADDING:
        taken = tl.load(padding_ptr + token) == 0
    if OVERLAP:
        gdc_wait()
    pairs = tl.arange(0, ROWS)
    x_ptrs = act_ptr + (token * TOP_K + pairs).to(tl.int64)[:, None] * K + depth[None, :]
    acc = tl.zeros((EXPERTS * WIDTH, ROWS), tl.float32)
    in_x = (pairs < TOP_K)[:, None]
    deep = tl.where(taken, K, 0)
    acc = multiply(w_rows[:, None] + depth[None, :], x_ptrs, in_w[:, None], in_x, deep, acc, BLOCK_K, EVEN_K)
    rounded = acc.to(out_ptr.dtype.element_ty).to(tl.float32).to(tl.int32, bitcast=True)
    own = tl.sum(tl.where(number[:, None] == pairs[None, :], rounded, 0), 1)  # bits: a sum would lose the sign of zero
    own = tl.reshape(own, (EXPERTS, WIDTH))
    total = tl.zeros((WIDTH,), tl.float32)
    for j in tl.static_range(TOP_K):
        y = tl.sum(tl.where((numbers == j)[:, None], own, 0), 0).to(tl.float32, bitcast=True)
        weight = tl.sum(tl.where(numbers == j, weights, 0), 0).to(tl.float32, bitcast=True)
        total = tl.where(taken, tl.fma(tl.broadcast_to(weight, (WIDTH,)), y, total), total)
    out = block * WIDTH + tl.arange(0, WIDTH)
    at = token.to(tl.int64) * N + out
    if HAS_SHARED:
        total += tl.load(shared_ptr + at, mask=out < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=out < N)


def forward(
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    padding: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    shared: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
    *,
    gated_tile: tuple[int, int, int] = GATED_TILES[0],
    down_tile: tuple[int, int, int] = DOWN_TILES[0],
) -> Tensor:
    """x (T, H), logits (T, E) fp32, gate_up (E, 2I, H), down (E, H, I), shared (T, H) or None, contiguous -> (T, H);
    adds to ``digest`` (T,). The tiles are for tuning: no bit depends on them."""
    (num_tokens, hidden), width = x.shape, down.shape[2]
    route = constants(logits.shape[1], bias, digest, top_k, scoring, num_groups, top_groups, normalize, round_to)
    overlap = overlaps(x.device)
    act, out = x.new_empty(num_tokens * top_k, width), torch.empty_like(x)
    options = {"OVERLAP": overlap, "num_warps": WARPS, "enable_fp_fusion": False, **overlapping(overlap)}
    columns, depth, stages = gated_tile
    few_gated_kernel[(num_tokens * top_k, cdiv(width, columns))](
        logits,
        logits if bias is None else bias,
        logits if digest is None else digest,
        logits if padding is None else padding,
        x,
        gate_up,
        act,
        num_tokens,
        scale,
        salt,
        width,
        hidden,
        **route,
        HAS_PADDING=padding is not None,
        WARPS=WARPS,
        ROWS=ROWS,
        BLOCK_N=columns,
        BLOCK_K=depth,
        EVEN_K=hidden % depth == 0,
        num_stages=stages,
        **options,
    )
    columns, depth, stages = down_tile
    experts = next_power_of_2(top_k)
    together = max(1, columns // experts)
    few_down_kernel[(cdiv(hidden, together), num_tokens)](
        logits,
        logits if bias is None else bias,
        logits if padding is None else padding,
        act,
        down,
        x if shared is None else shared,
        out,
        num_tokens,
        scale,
        salt,
        hidden,
        width,
        **route,
        HAS_PADDING=padding is not None,
        HAS_SHARED=shared is not None,
        WARPS=WARPS,
        ROWS=max(ROWS, experts),
        EXPERTS=experts,
        WIDTH=together,
        BLOCK_K=depth,
        EVEN_K=width % depth == 0,
        num_stages=stages,
        **options,
    )
    return out
