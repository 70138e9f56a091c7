"""Log-probabilities from logits: the one definition that the sampler and the fused linear cross-entropy share.

The vocabulary is cut into blocks of BLOCK columns at absolute positions. A block's state is its maximum m, the sum
s of e^(z - m) and the moment t, the sum of e^(z - m) (z - m); sums are trees of explicit pairs. The states of a row are
merged by one more such tree. No sum is left to the compiler, so a state has the same bits whether it is formed from
stored logits or in the epilogue of the product that makes them, in any tile, for any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import cdiv

_blocks, _merge = Launches(), Launches()
BLOCK = 64  # decides bits
QUARTER_LEVELS = (BLOCK // 4).bit_length() - 1
BLOCKS_PER_PROGRAM = 32
MERGE_WARPS = 8


@triton.jit
def pair_sum_columns(x, LEVELS: tl.constexpr):
    """(R, 2**LEVELS) -> (R,): left half plus right half, again and again.

    Every reduction has two terms, so neither the thread layout nor the compiler has an order to choose.
    """
    for _ in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), 1)
    return tl.max(x, 1)


@triton.jit
def scaled(logit, inv_temperature, min_logit, columns, V):
    """z of the kept columns, -inf elsewhere. NaN logits are kept, so that they show."""
    dropped = (logit < min_logit) | (columns >= V)
    return tl.where(dropped, float("-inf"), logit * inv_temperature)


@triton.jit
def exponential_terms(z, base):
    """e^(z - base) and e^(z - base) (z - base), which is 0 where z is -inf."""
    shifted = z - base[:, None]
    p = tl.exp(shifted)
    return p, tl.where(p > 0.0, p * shifted, 0.0)


@triton.jit
def block_top(first, second, third, fourth):
    """Maximum per row of a block in quarters, and what its exponentials are taken from: the same, but never -inf."""
    top = tl.maximum(tl.maximum(tl.max(first, 1), tl.max(second, 1)), tl.maximum(tl.max(third, 1), tl.max(fourth, 1)))
    return top, tl.where(top == float("-inf"), 0.0, top)  # nothing kept: avoid inf - inf


@triton.jit
def block_state(first, second, third, fourth, QUARTER_LEVELS: tl.constexpr):
    """State of a block of columns per row, from the four quarters of its z, each (R, BLOCK / 4), in column order.

    Quarters, because adding them is free in every layout: the first two levels of the tree.
    """
    top, base = block_top(first, second, third, fourth)
    p0, t0 = exponential_terms(first, base)
    p1, t1 = exponential_terms(second, base)
    p2, t2 = exponential_terms(third, base)
    p3, t3 = exponential_terms(fourth, base)
    total = pair_sum_columns((p0 + p2) + (p1 + p3), QUARTER_LEVELS)
    moment = pair_sum_columns((t0 + t2) + (t1 + t3), QUARTER_LEVELS)
    return top, total, moment


@triton.jit
def load_quarter(row_ptr, columns, inv_temperature, min_logit, V):
    logit = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf"))
    return scaled(logit, inv_temperature, min_logit, columns, V)


@triton.jit
def block_states_kernel(
    logits_ptr,  # (B, V) fp32
    inv_temperature_ptr,  # (B,) fp32
    min_logit_ptr,  # (B,) fp32
    top_ptr,  # (B, blocks) fp32, as the next two
    total_ptr,
    moment_ptr,
    V,
    stride,
    blocks,
    BLOCK: tl.constexpr,
    QUARTER_LEVELS: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
):
    """States of BLOCKS_PER_PROGRAM blocks of one row."""
    QUARTER: tl.constexpr = BLOCK // 4
    row = tl.program_id(0).to(tl.int64)
    inv_temperature = tl.load(inv_temperature_ptr + row)
    min_logit = tl.load(min_logit_ptr + row)
    row_ptr = logits_ptr + row * stride
    block = tl.program_id(1) * BLOCKS_PER_PROGRAM + tl.arange(0, BLOCKS_PER_PROGRAM)
    columns = block[:, None] * BLOCK + tl.arange(0, QUARTER)[None, :]
    top, total, moment = block_state(
        load_quarter(row_ptr, columns, inv_temperature, min_logit, V),
        load_quarter(row_ptr, columns + QUARTER, inv_temperature, min_logit, V),
        load_quarter(row_ptr, columns + 2 * QUARTER, inv_temperature, min_logit, V),
        load_quarter(row_ptr, columns + 3 * QUARTER, inv_temperature, min_logit, V),
        QUARTER_LEVELS,
    )
    at = row * blocks + block
    tl.store(top_ptr + at, top, mask=block < blocks)
    tl.store(total_ptr + at, total, mask=block < blocks)
    tl.store(moment_ptr + at, moment, mask=block < blocks)


@triton.jit
def merge_states_kernel(
    top_ptr,  # (B, blocks) fp32, as the next two
    total_ptr,
    moment_ptr,
    chosen_ptr,  # raw logit of the token: row r at r * chosen_stride, plus the token id when GATHER
    token_ptr,  # (B,) int64
    inv_temperature_ptr,  # (B,) fp32
    min_logit_ptr,  # (B,) fp32
    logprob_ptr,  # (B,) fp32
    lse_ptr,  # (B,) fp32
    entropy_ptr,  # (B,) fp32
    V,
    chosen_stride,
    blocks,
    LEVELS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """lse = m + log s, entropy = log s - t / s, log-prob = z - lse; one program per row.

    The token itself is always kept: where the blocks have dropped it, it is added as one more term.
    """
    row = tl.program_id(0).to(tl.int64)
    LANES: tl.constexpr = 1 << LEVELS
    lanes = tl.arange(0, LANES)
    inside = lanes < blocks
    at = row * blocks + lanes
    top = tl.load(top_ptr + at, mask=inside, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=inside, other=0.0)
    moment = tl.load(moment_ptr + at, mask=inside, other=0.0)
    token = tl.load(token_ptr + row)
    # A token outside the vocabulary has no log-probability: NaN shows up in every audit, a clamped index would not.
    known = (token >= 0) & (token < V)
    offset = token if GATHER else 0
    chosen = tl.load(chosen_ptr + row * chosen_stride + offset, mask=known, other=float("nan"))
    z = chosen * tl.load(inv_temperature_ptr + row)
    dropped = tl.where(chosen < tl.load(min_logit_ptr + row), z, float("-inf"))

    row_top = tl.maximum(tl.max(top, 0), dropped)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    decay = tl.exp(top - base)
    moved = tl.where(top == float("-inf"), 0.0, top - base)
    row_total = tl.max(pair_sum_columns(tl.reshape(decay * total, (1, LANES)), LEVELS), 0)
    row_moment = tl.max(pair_sum_columns(tl.reshape(decay * (moment + total * moved), (1, LANES)), LEVELS), 0)
    term = tl.exp(dropped - base)
    row_total += term
    row_moment += tl.where(term > 0.0, term * (dropped - base), 0.0)
    lse = base + tl.log(row_total)
    tl.store(lse_ptr + row, lse)
    tl.store(logprob_ptr + row, z - lse)
    tl.store(entropy_ptr + row, tl.log(row_total) - row_moment / row_total)


def empty_states(rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Room for the states of every block: (maximum | sum | moment, rows, blocks) fp32.

    The number of blocks is rounded up to a multiple of 4 (the state of a block beyond the vocabulary is that of an
    empty set), so that alignment does not depend on the rows and one binary serves every batch size.
    """
    return torch.empty(3, rows, 4 * cdiv(vocabulary, 4 * BLOCK), dtype=torch.float32, device=device)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, inv_temperature: Tensor, min_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """logits (B, V) fp32, the rest (B,) -> log-prob of the token, log-sum-exp and entropy of the kept set, (B,) fp32.

    z = logit * inv_temperature and the kept set is {logit >= min_logit} and the token itself; nats.
    """
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    states = empty_states(rows, vocabulary, logits.device)
    blocks = states.shape[2]
    if rows:
        tensors = logits, inv_temperature.contiguous(), min_logit.contiguous(), *states
        sizes = vocabulary, logits.stride(0), blocks

        def call() -> Call:
            tile = {"BLOCK": BLOCK, "QUARTER_LEVELS": QUARTER_LEVELS, "BLOCKS_PER_PROGRAM": BLOCKS_PER_PROGRAM}
            grid = rows, cdiv(blocks, BLOCKS_PER_PROGRAM)
            # Without fusion each product is rounded where it is written, in every binary that forms a state.
            options = {"num_warps": 4, "enable_fp_fusion": False}
            return Call(block_states_kernel, grid, (*tensors, *sizes), {**tile, **options})

        _blocks((rows, *sizes, *(tensor.dtype for tensor in tensors[:3])), tensors, call)
    return merge_states(states, logits, token_ids, inv_temperature, min_logit, vocabulary, gather=True)


def merge_states(
    states: Tensor,
    chosen: Tensor,
    token_ids: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    vocabulary: int,
    gather: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``states`` (3, B, blocks); ``chosen`` holds the tokens' logits, (B,), or with ``gather`` all, (B, V)."""
    rows, blocks = states.shape[1:]
    logprobs, lse, entropy = (torch.empty(rows, dtype=torch.float32, device=states.device) for _ in range(3))
    if rows:
        vectors = token_ids.contiguous(), inv_temperature.contiguous(), min_logit.contiguous()
        tensors = *states, chosen, *vectors, logprobs, lse, entropy
        sizes = vocabulary, chosen.stride(0), blocks

        def call() -> Call:
            levels = {"LEVELS": max((blocks - 1).bit_length(), 1), "GATHER": gather}
            options = {"num_warps": MERGE_WARPS, "enable_fp_fusion": False}
            return Call(merge_states_kernel, (rows,), (*tensors, *sizes), {**levels, **options})

        _merge((rows, *sizes, gather, chosen.dtype, *(vector.dtype for vector in vectors)), tensors, call)
    return logprobs, lse, entropy
