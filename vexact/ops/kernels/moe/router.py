"""Router in Triton: scores, choice and weights of a tile of tokens per program; forward, backward, and with groups."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.moe import groups
from vexact.ops.kernels.moe.scores import LEFT_OUT, in_best_groups, largest, mixed, order_key, scores_of
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

_backward = Launches()

ROWS = 4  # tokens of a program, one a warp
FEW_TOKENS = 8  # one program routes and groups them, a warp each; several programs rank as many each
WARP = 32  # columns that a row has at least: narrower tiles do not compile everywhere
MANY_TOKENS, MANY_ROWS = 2048, 16  # from so many on, four tokens a warp
ROUND_TO = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def choose(
    logits_ptr, bias_ptr, rows, num_tokens, scale, salt,
    E: tl.constexpr, NUM_GROUPS: tl.constexpr, LEVELS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr, BEST: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr, ROUND_TO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DIGEST: tl.constexpr,
):  # fmt: skip
    """Routes of ``rows``. Returns (R, C): whether each column is chosen, as how manyth, with what weight; (C,) its
    expert, whether there is one; and (R,) what the routes add to a digest."""
    columns = tl.arange(0, GROUPS * SIZE)
    member = columns % SIZE
    known = (columns < NUM_GROUPS * SIZE) & (member < E // NUM_GROUPS)
    index = columns // SIZE * (E // NUM_GROUPS) + member
    scores = scores_of(logits_ptr, rows, num_tokens, index, known, E, LEVELS, SIGMOID)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + index, mask=known, other=0.0)[None, :]
    order = tl.where(known[None, :], (order_key(choice) << 32) - columns.to(tl.int64)[None, :], LEFT_OUT)
    if GROUPS > 1:
        order = tl.where(in_best_groups(order, ROWS, GROUPS, SIZE, TOP_GROUPS, BEST), order, LEFT_OUT)
    chosen = largest(order, TOP_K) & (rows < num_tokens)[:, None]
    position = tl.cumsum(chosen.to(tl.int32), 1) - 1
    total = tl.zeros((ROWS,), tl.float32)
    state = (salt.to(tl.int64) + 1) * -7046029254386353131 + tl.zeros((ROWS,), tl.int64)
    for j in tl.static_range(TOP_K):
        here = chosen & (position == j)
        if NORMALIZE:
            total += tl.sum(tl.where(here, scores, 0.0), 1)
        if HAS_DIGEST:
            expert = tl.sum(tl.where(here, index[None, :], 0), 1)
            state = mixed(state + (expert.to(tl.int64) + 1) * -3335678366873096957)
    weights = scores
    if NORMALIZE:
        if SIGMOID:
            total += 1e-20
        weights = tl.div_rn(scores, tl.broadcast_to(total[:, None], scores.shape))
    weights = (weights * scale).to(ROUND_TO).to(tl.float32)
    return chosen, position, weights, index, known, state


@triton.jit
def add_to_digest(digest_ptr, rows, state, here):
    """The digests of ``rows`` and what their routes add, where ``here``."""
    before = tl.load(digest_ptr + rows, mask=here, other=0)
    tl.store(digest_ptr + rows, before + state, mask=here)


@triton.jit(do_not_specialize=["num_tokens", "salt"])
def route_kernel(
    logits_ptr,  # (T, E) fp32
    bias_ptr,  # (E,) fp32
    digest_ptr,  # (T,) int64
    padding_ptr,  # (T,) bool, tokens that get no place
    experts_ptr,  # (T, TOP_K) int32
    weights_ptr,  # (T, TOP_K) fp32
    slots_ptr,  # (T, TOP_K) int32, places when ALONE, else ranks among the pairs of the program
    rows_ptr,  # (T * TOP_K,) int32, written when ALONE
    offsets_ptr,  # (E + 1,) int32, written when ALONE
    counts_ptr,  # (programs, BINS) int32, written unless ALONE
    num_tokens,
    scale,
    salt,
    E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,  # at least ROWS * TOP_K
    BINS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DIGEST: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    GROUP: tl.constexpr,
    ALONE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS tokens, with ALONE all of them. With GROUP they are grouped: a column of the choice tells the ranks of an
    expert's pairs."""
    if OVERLAP:
        gdc_launch_dependents()  # the next kernel may start; it waits for this one to end before it reads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chosen, position, weights, index, known, state = choose(
        logits_ptr, bias_ptr, rows, num_tokens, scale, salt, E, NUM_GROUPS, LEVELS, GROUPS, SIZE, TOP_GROUPS, BEST,
        TOP_K, ROWS, SIGMOID, NORMALIZE, ROUND_TO, HAS_BIAS, HAS_DIGEST,
    )  # fmt: skip
    pairs = rows[:, None] * TOP_K + position
    tl.store(experts_ptr + pairs, tl.broadcast_to(index[None, :], chosen.shape), mask=chosen)
    tl.store(weights_ptr + pairs, weights, mask=chosen)
    if HAS_DIGEST:
        add_to_digest(digest_ptr, rows, state, rows < num_tokens)
    if GROUP:
        taken = chosen
        if HAS_PADDING:
            padding = tl.load(padding_ptr + rows, mask=rows < num_tokens, other=0).to(tl.int1)
            taken = chosen & ~padding[:, None]
        counts = tl.sum(taken.to(tl.int32), 0)
        places = tl.cumsum(taken.to(tl.int32), 0) - 1
        if ALONE:
            past = tl.cumsum(counts, 0)
            places += (past - counts)[None, :]
        tl.store(slots_ptr + pairs, tl.where(taken, places, -1), mask=chosen)
        if ALONE:
            tl.store(rows_ptr + places, pairs, mask=taken)
            if HAS_PADDING:
                behind = tl.sum(counts, 0) + tl.arange(0, PAIRS)
                tl.store(rows_ptr + behind, tl.zeros((PAIRS,), tl.int32), mask=behind < num_tokens * TOP_K)
            tl.store(offsets_ptr + index + 1, past, mask=known)
            tl.store(offsets_ptr, 0)
        else:
            tl.store(counts_ptr + tl.program_id(0) * BINS + index, counts, mask=known)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    dweights_ptr,  # (T, TOP_K) fp32
    logits_ptr,  # (T, E) fp32
    experts_ptr,  # (T, TOP_K) int32
    dlogits_ptr,  # (T, E) fp32
    num_tokens,
    scale,
    E: tl.constexpr,
    LEVELS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The formula stands with the CPU twin; sums over the chosen go in the order of the experts."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_batch = rows < num_tokens
    index = tl.arange(0, 1 << LEVELS)
    known = index < E
    scores = scores_of(logits_ptr, rows, num_tokens, index, known, E, LEVELS, SIGMOID)
    total = tl.zeros((ROWS,), tl.float32)
    inner = tl.zeros((ROWS,), tl.float32)
    grad = tl.zeros(scores.shape, tl.float32)
    chosen = scores != scores
    chosen = chosen & ~chosen
    for j in tl.static_range(TOP_K):
        pairs = rows * TOP_K + j
        expert = tl.load(experts_ptr + pairs, mask=in_batch, other=-1)
        dweight = tl.load(dweights_ptr + pairs, mask=in_batch, other=0.0) * scale
        here = expert[:, None] == index[None, :]
        score = tl.sum(tl.where(here, scores, 0.0), 1)
        total += score
        inner += dweight * score
        grad = tl.where(here, dweight[:, None], grad)
        chosen = chosen | here
    if NORMALIZE:
        if SIGMOID:
            total += 1e-20
        mean = tl.div_rn(inner, total)
        grad = tl.div_rn(grad - mean[:, None], tl.broadcast_to(total[:, None], scores.shape))
    if SIGMOID:
        dlogits = tl.where(chosen, grad * scores * (1.0 - scores), 0.0)
    elif NORMALIZE:
        dlogits = tl.where(chosen, grad * scores, 0.0)
    else:
        dlogits = scores * (grad - inner[:, None])
    ptrs = dlogits_ptr + rows.to(tl.int64)[:, None] * E + index[None, :]
    tl.store(ptrs, dlogits, mask=in_batch[:, None] & known[None, :])


def forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor]:
    """logits (T, E) fp32 contiguous -> experts (T, k) int32 ascending, weights (T, k) fp32; adds to ``digest`` (T,)."""
    choice = top_k, scoring, num_groups, top_groups, normalize, scale, round_to, salt
    experts, weights, *_ = _launch(logits, bias, digest, None, *choice, block=ROWS, group=False)
    return experts, weights


def grouped_forward(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    padding: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward`, then rows, slots and offsets of its experts, none for ``padding`` (T,) bool."""
    choice = top_k, scoring, num_groups, top_groups, normalize, scale, round_to, salt
    num_tokens, num_experts = logits.shape
    alone, block = 0 < num_tokens <= FEW_TOKENS, MANY_ROWS if num_tokens >= MANY_TOKENS else FEW_TOKENS
    if alone:
        block = next_power_of_2(num_tokens)
    experts, weights, slots, rows, offsets, counts = _launch(
        logits, bias, digest, padding, *choice, block=block, group=True, alone=alone
    )
    if not alone:
        rows, offsets = groups.place(experts, slots, counts, num_experts, block * top_k)
    return experts, weights, rows, slots, offsets


def backward(
    dweights: Tensor, logits: Tensor, experts: Tensor, top_k: int, scoring: str, normalize: bool, scale: float
) -> Tensor:
    """dweights (T, k) fp32 -> dlogits (T, E) fp32; every tensor contiguous."""
    (num_tokens, num_experts), dlogits = logits.shape, torch.empty_like(logits)
    constants = {
        **{"E": num_experts, "LEVELS": next_power_of_2(num_experts).bit_length() - 1, "TOP_K": top_k, "ROWS": ROWS},
        **{"SIGMOID": scoring == "sigmoid", "NORMALIZE": normalize, "num_warps": 4, "enable_fp_fusion": False},
    }
    tensors, grid = (dweights, logits, experts, dlogits), (cdiv(num_tokens, ROWS),)
    key = num_tokens, num_experts, top_k, scoring, normalize, scale
    _backward(key, tensors, lambda: Call(route_backward_kernel, grid, (*tensors, num_tokens, scale), constants))
    return dlogits


def constants(
    num_experts: int,
    bias: Tensor | None,
    digest: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    round_to: torch.dtype,
) -> dict[str, Any]:
    """What a kernel that calls ``choose`` has to know when it is compiled, but its rows."""
    return {
        "E": num_experts,
        "NUM_GROUPS": num_groups,
        "LEVELS": next_power_of_2(num_experts).bit_length() - 1,
        "GROUPS": next_power_of_2(num_groups),
        "SIZE": max(next_power_of_2(num_experts // num_groups), WARP // next_power_of_2(num_groups)),
        "TOP_GROUPS": top_groups,
        "BEST": 2 if scoring == "sigmoid" else 1,
        "TOP_K": top_k,
        "SIGMOID": scoring == "sigmoid",
        "NORMALIZE": normalize,
        "ROUND_TO": ROUND_TO[round_to],
        "HAS_BIAS": bias is not None,
        "HAS_DIGEST": digest is not None,
    }


def _launch(
    logits: Tensor,
    bias: Tensor | None,
    digest: Tensor | None,
    padding: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
    round_to: torch.dtype,
    salt: int,
    *,
    block: int,
    group: bool,
    alone: bool = False,
) -> tuple[Tensor, ...]:
    """experts, weights, slots, rows, offsets, counts; see the kernel for which are written."""
    num_tokens, num_experts = logits.shape
    programs, bins = cdiv(num_tokens, block), groups.bins_of(num_experts)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    slots = rows = offsets = counts = experts
    if group:
        slots = torch.empty_like(experts)
    if alone:
        rows, offsets = experts.new_empty(num_tokens * top_k), experts.new_empty(num_experts + 1)
    elif group:
        counts = experts.new_empty(programs, bins)
    route_kernel[(programs,)](
        logits,
        logits if bias is None else bias,
        logits if digest is None else digest,
        logits if padding is None else padding,
        experts,
        weights,
        slots,
        rows,
        offsets,
        counts,
        num_tokens,
        scale,
        salt,
        **constants(num_experts, bias, digest, top_k, scoring, num_groups, top_groups, normalize, round_to),
        ROWS=block,
        PAIRS=next_power_of_2(block * top_k),
        BINS=bins,
        HAS_PADDING=padding is not None,
        GROUP=group,
        ALONE=alone,
        OVERLAP=alone and overlaps(logits.device),
        num_warps=4 if block == MANY_ROWS else min(block, FEW_TOKENS),
        enable_fp_fusion=False,
    )
    return experts, weights, slots, rows, offsets, counts
