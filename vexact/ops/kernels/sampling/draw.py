"""Sampling in Triton: a Gumbel-max draw from the kept set and the log-probability the trainer will compute.

The maximum is exact in any order, so programs are free to split a row, and a row's token depends on that row and its
parameters alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.logprob import token_logprobs
from vexact.ops.kernels.sampling.philox import philox_4x32_10
from vexact.ops.kernels.sampling.portable_math import log_of_normal
from vexact.ops.kernels.sampling.threshold import thresholds
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

_draw, _choose = Launches(), Launches()
DRAW_CONFIG = {"CHUNK": 8192, "BLOCK": 1024, "num_warps": 4}


@triton.jit
def gumbel_from_bits(bits):
    """Standard Gumbel noise -log(-log u) from uint32 words, with u = ((r >> 9) + 1/2) / 2^23 exact in fp32."""
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -log_of_normal(-log_of_normal(u))


@triton.jit
def _draw_kernel(
    logits_ptr,  # (B, V) fp32
    temperature_ptr,  # (B,) fp32
    inv_temperature_ptr,  # (B,) fp32
    min_logit_ptr,  # (B,) fp32
    seed_ptr,  # (B,) int64
    position_ptr,  # (B,) int64
    best_score_ptr,  # (B, S) fp32, written
    best_token_ptr,  # (B, S) int32, written
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    sampled = tl.load(temperature_ptr + row) > 0.0
    inv_temperature = tl.load(inv_temperature_ptr + row)
    min_logit = tl.load(min_logit_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * vocab_size

    best_score = tl.full((BLOCK // 4, 4), float("-inf"), tl.float32)
    lanes = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    best_token = chunk * CHUNK + lanes
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, vocab_size), BLOCK):
        columns = start + lanes
        x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        kept = (x >= min_logit) & (columns < vocab_size)
        score = x * inv_temperature
        noisy = sampled
        if min_logit > float("-inf"):
            noisy = sampled & (tl.max(tl.max(kept.to(tl.int32), 1), 0) > 0)
        if noisy:
            score += _noise(start // 4, seed, position, BLOCK)
        score = tl.where(kept, score, float("-inf"))
        # Columns grow from step to step, so a strict comparison keeps the lowest index of a tie.
        better = score > best_score
        best_score = tl.where(better, score, best_score)
        best_token = tl.where(better, columns, best_token)
    _store_best(best_score_ptr, best_token_ptr, row * num_chunks + chunk, best_score, best_token)


@triton.jit
def _noise(first_counter, seed, position, BLOCK: tl.constexpr):
    """Gumbel noise (BLOCK // 4, 4) for the vocabulary entries from 4 * first_counter on."""
    counter = (first_counter + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    r0, r1, r2, r3 = philox_4x32_10(
        counter,
        zero + _low_word(position),
        zero + _low_word(position >> 32),
        zero,
        _low_word(seed),
        _low_word(seed >> 32),
    )
    # join appends an axis: (even, odd) words last, so the lanes come out in the order 0, 1, 2, 3.
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    return gumbel_from_bits(tl.reshape(words, (BLOCK // 4, 4)))


@triton.jit
def _low_word(value):
    return (value & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _store_best(score_ptr, token_ptr, slot, score, token):
    best = tl.max(tl.max(score, 1), 0)
    lowest = tl.min(tl.min(tl.where(score == best, token, 0x7FFFFFFF), 1), 0)
    tl.store(score_ptr + slot, best)
    tl.store(token_ptr + slot, lowest)


@triton.jit
def _choose_kernel(
    best_score_ptr,  # (B, S) fp32
    best_token_ptr,  # (B, S) int32
    token_ptr,  # (B,) int64, written
    num_chunks,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0)
    chunks = tl.arange(0, BLOCK_S)
    mask = chunks < num_chunks
    score = tl.load(best_score_ptr + row * num_chunks + chunks, mask=mask, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_chunks + chunks, mask=mask, other=0x7FFFFFFF)
    best = tl.max(score, 0)
    lowest = tl.min(tl.where(score == best, token, 0x7FFFFFFF), 0)
    tl.store(token_ptr + row, lowest.to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row by Gumbel-max over the kept set, its log-probability and the smallest kept logit.

    No host synchronisation; the launches depend on the shape only, so they can be captured in a CUDA graph. A row that
    uses no filter costs nothing in the threshold kernel.

    Args:
        logits: (B, V) fp32. temperature, top_p, min_p: (B,) fp32, temperature 0 = greedy, top_p >= 1 and
            min_p <= 0 = off. top_k: (B,) int32, <= 0 = off. seed, position: (B,) int64.

    Returns:
        token_ids (B,) int64, logprobs (B,) fp32, min_logit (B,) fp32 (-inf keeps every token).
    """
    logits, temperature, seed, position = (x.contiguous() for x in (logits, temperature, seed, position))
    filters = top_k.contiguous(), top_p.contiguous(), min_p.contiguous()
    inv_temperature, min_logit = thresholds(logits, temperature, *filters)
    token_ids = draw(logits, temperature, inv_temperature, min_logit, seed, position)
    logprobs, _, _ = token_logprobs(logits, token_ids, inv_temperature, min_logit)
    return token_ids, logprobs, min_logit


def draw(
    logits: Tensor,
    temperature: Tensor,
    inv_temperature: Tensor,
    min_logit: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """Token ids (B,) int64: the largest of z + Gumbel noise over {logit >= min_logit}, or of the logits if greedy.

    Every tensor is contiguous.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = cdiv(vocab_size, DRAW_CONFIG["CHUNK"])
    best_score = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=logits.device)
    best_token = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    tensors = logits, temperature, inv_temperature, min_logit, seed, position, best_score, best_token
    _draw(
        (num_rows, vocab_size, *(tensor.dtype for tensor in tensors[:6])),
        tensors,
        lambda: Call(
            _draw_kernel,
            (num_rows, num_chunks),
            (*tensors, vocab_size, num_chunks),
            {**DRAW_CONFIG, "enable_fp_fusion": False},
        ),
    )
    chunks = best_score, best_token, token_ids
    _choose(
        (num_rows, num_chunks),
        chunks,
        lambda: Call(
            _choose_kernel,
            (num_rows,),
            (*chunks, num_chunks),
            {"BLOCK_S": next_power_of_2(num_chunks), "num_warps": 1},
        ),
    )
    return token_ids
