"""The kept set of a row: exact top-k, top-p and min-p thresholds by searching, without sorting.

The set is {logit >= threshold}, ties included. Every reduction over the vocabulary is exact in any order (maximum,
count, fixed-point integer mass), so the threshold does not depend on how the row is walked.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sampling.portable_math import exp_of_negative, log_of_normal

_launches = Launches()
THRESHOLD_CONFIG = {"BLOCK": 4096, "ROUNDS": 8, "num_warps": 16}
_MAX_BLOCKS = 511  # a lane counts its tokens in ten bits, and a row in 21
# Tokens this far below the best (in nats, or logits where the temperature is below one) seldom matter to a filter.
_CUT = tl.constexpr(12.0)
# Pivots are first spread evenly over logits, where tokens are, and later over keys, where progress is certain.
_PASSES_BY_VALUE = tl.constexpr(8)
# Probabilities relative to the largest are summed as multiples of 2^-40: 2^22 tokens of weight one fit an int64.
_MASS_ONE = tl.constexpr(1099511627776.0)
_KEY_OF_NOTHING = tl.constexpr(-2147483648)
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _order_key(x):
    """An int32 that orders as the fp32 ``x`` does; -0 and +0 share one key."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pivot(low, high, passes, QUARTER: tl.constexpr):
    """A key strictly between ``low`` and ``high`` (int64, at least two apart), about QUARTER quarters of the way."""
    first = _value_of_key(low)
    span = _value_of_key(high - 1) - first
    by_value = _order_key(first + span * (QUARTER / 4)).to(tl.int64)
    by_value = tl.minimum(tl.maximum(by_value, low + 1), high - 1)
    by_key = low + ((high - low) * QUARTER) // 4
    return tl.where((passes < _PASSES_BY_VALUE) & (span < float("inf")), by_value, by_key)


@triton.jit
def _value_of_key(key):
    """The fp32 whose order key is the int64 ``key``."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_row(row_ptr, columns, vocab_size):
    return tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))


@triton.jit
def _mass(x, inv_temperature, max_z):
    """exp(z - max z) in fixed point."""
    return (exp_of_negative(x * inv_temperature - max_z) * _MASS_ONE).to(tl.int64)


@triton.jit
def _row_range(row_ptr, vocab_size, BLOCK: tl.constexpr):
    """Smallest and largest logit of a row."""
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load_row(row_ptr, columns, vocab_size)
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, tl.where(columns < vocab_size, x, float("inf")))
    return tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def _kept_weight(row_ptr, vocab_size, key, inv_temperature, max_z, BLOCK: tl.constexpr):
    """Number and total mass of the tokens whose order key is at least ``key``."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load_row(row_ptr, columns, vocab_size)
        kept = (_order_key(x) >= key) & (columns < vocab_size)
        count += kept.to(tl.int32)
        mass += tl.where(kept, _mass(x, inv_temperature, max_z), 0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _gather_top(
    row_ptr,
    vocab_size,
    key,
    copy_ptr,  # (ROUNDS * BLOCK,) fp32, written
    inv_temperature,
    max_z,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies the logits whose order key is at least ``key``; a lane has room for ROUNDS of them, -inf fills the rest.

    Returns how many there are, the most that one lane met, their mass, and the mass of the whole row.
    """
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    top_mass = tl.zeros((BLOCK,), tl.int64)
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        x = _load_row(row_ptr, columns, vocab_size)
        top = (_order_key(x) >= key) & (columns < vocab_size)
        weight = tl.where(columns < vocab_size, _mass(x, inv_temperature, max_z), 0)
        mass += weight
        top_mass += tl.where(top, weight, 0)
        tl.store(copy_ptr + count * BLOCK + lanes, x, mask=top & (count < ROUNDS))
        count += top.to(tl.int32)
    for used in tl.static_range(ROUNDS):
        tl.store(copy_ptr + used * BLOCK + lanes, float("-inf"), mask=count <= used)
    return tl.sum(count, 0), tl.max(count, 0), tl.sum(top_mass, 0), tl.sum(mass, 0)


@triton.jit
def _search(
    tokens_ptr,
    num_tokens,
    low,  # int64 key, known to satisfy: weight(key >= low) >= target
    high,  # int64 key, known not to
    low_count,
    low_weight,
    target,  # int64
    inv_temperature,
    max_z,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest key, up to tokens that do not exist, whose tokens at or above it weigh at least ``target``.

    Each pass tries three pivots in the bracket. The search ends when one token is left between the bounds, which comes
    before the bracket closes unless tokens tie.
    """
    high_count = tl.zeros((), tl.int32)
    passes = tl.zeros((), tl.int32)
    while (high - low > 1) & (low_count - high_count > 1) & (low_weight > target):
        pivot1 = _pivot(low, high, passes, 1)
        pivot2 = _pivot(low, high, passes, 2)
        pivot3 = _pivot(low, high, passes, 3)
        passes += 1
        packed = tl.zeros((BLOCK,), tl.int32)  # three counts of ten bits
        mass1 = tl.zeros((BLOCK,), tl.int64)
        mass2 = tl.zeros((BLOCK,), tl.int64)
        mass3 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, num_tokens, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _load_row(tokens_ptr, columns, num_tokens)
            key = tl.where(columns < num_tokens, _order_key(x), _KEY_OF_NOTHING)
            above1 = key >= pivot1.to(tl.int32)
            above2 = key >= pivot2.to(tl.int32)
            above3 = key >= pivot3.to(tl.int32)
            packed += above1.to(tl.int32) + (above2.to(tl.int32) << 10) + (above3.to(tl.int32) << 20)
            if BY_MASS:
                mass = _mass(x, inv_temperature, max_z)
                mass1 += tl.where(above1, mass, 0)
                mass2 += tl.where(above2, mass, 0)
                mass3 += tl.where(above3, mass, 0)
        wide = (packed & 1023).to(tl.int64) + (((packed >> 10) & 1023).to(tl.int64) << 21)
        counts = tl.sum(wide + ((packed >> 20).to(tl.int64) << 42), 0)
        n1 = (counts & 0x1FFFFF).to(tl.int32)
        n2 = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        n3 = (counts >> 42).to(tl.int32)
        w1 = n1.to(tl.int64)
        w2 = n2.to(tl.int64)
        w3 = n3.to(tl.int64)
        if BY_MASS:
            w1 = tl.sum(mass1, 0)
            w2 = tl.sum(mass2, 0)
            w3 = tl.sum(mass3, 0)
        # Weights fall from pivot 1 to pivot 3: the new bounds are the two neighbours that disagree.
        met1 = w1 >= target
        met2 = w2 >= target
        met3 = w3 >= target
        high = tl.where(met1, tl.where(met2, tl.where(met3, high, pivot3), pivot2), pivot1)
        high_count = tl.where(met1, tl.where(met2, tl.where(met3, high_count, n3), n2), n1)
        low = tl.where(met3, pivot3, tl.where(met2, pivot2, tl.where(met1, pivot1, low)))
        low_count = tl.where(met3, n3, tl.where(met2, n2, tl.where(met1, n1, low_count)))
        low_weight = tl.where(met3, w3, tl.where(met2, w2, tl.where(met1, w1, low_weight)))
    return low


@triton.jit
def _smallest_kept(row_ptr, vocab_size, key, inv_temperature, max_z, log_min_p, BLOCK: tl.constexpr):
    """Smallest logit whose order key is at least ``key`` and whose probability is at least min_p times the largest."""
    smallest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _load_row(row_ptr, columns, vocab_size)
        kept = (_order_key(x) >= key) & (x * inv_temperature - max_z >= log_min_p) & (columns < vocab_size)
        smallest = tl.minimum(smallest, tl.where(kept, x, float("inf")))
    return tl.min(smallest, 0)


@triton.jit
def _filter(
    tokens_ptr,  # (num_tokens,) fp32: a row, or its best tokens
    num_tokens,
    low,
    high,
    mass,  # of the tokens
    wanted_mass,
    by_count,
    by_mass,
    top_k,
    top_p,
    inv_temperature,
    max_z,
    log_min_p,
    BLOCK: tl.constexpr,
):
    """Smallest logit that passes top-k, then top-p, then min-p."""
    count = num_tokens + tl.zeros((), tl.int32)
    if by_count:
        low = _search(
            tokens_ptr,
            num_tokens,
            low,
            high,
            count,
            count.to(tl.int64),
            top_k.to(tl.int64),
            inv_temperature,
            max_z,
            False,
            BLOCK,
        )
        if by_mass:
            count, mass = _kept_weight(tokens_ptr, num_tokens, low, inv_temperature, max_z, BLOCK)
            wanted_mass = _mass_wanted(top_p, mass)
    if by_mass:
        low = _search(tokens_ptr, num_tokens, low, high, count, mass, wanted_mass, inv_temperature, max_z, True, BLOCK)
    return _smallest_kept(tokens_ptr, num_tokens, low, inv_temperature, max_z, log_min_p, BLOCK)


@triton.jit
def _mass_wanted(top_p, total):
    return tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _threshold_kernel(
    logits_ptr,  # (B, V) fp32
    temperature_ptr,  # (B,) fp32
    top_k_ptr,  # (B,) int32
    top_p_ptr,  # (B,) fp32
    min_p_ptr,  # (B,) fp32
    inv_temperature_ptr,  # (B,) fp32, written
    min_logit_ptr,  # (B,) fp32, written
    scratch_ptr,  # (B, ROUNDS * BLOCK) fp32
    vocab_size,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    sampled = temperature > 0.0
    inv_temperature = tl.div_rn(1.0, tl.where(sampled, temperature, 1.0))
    tl.store(inv_temperature_ptr + row, inv_temperature)

    by_count = sampled & (top_k > 0) & (top_k < vocab_size)
    by_mass = sampled & (top_p < 1.0)
    by_ratio = sampled & (min_p > 0.0)
    threshold = tl.full((), float("-inf"), tl.float32)
    if by_count | by_mass | by_ratio:
        row_ptr = logits_ptr + row.to(tl.int64) * vocab_size
        smallest, largest = _row_range(row_ptr, vocab_size, BLOCK)
        max_z = largest * inv_temperature
        low = _order_key(smallest).to(tl.int64)
        high = _order_key(largest).to(tl.int64) + 1
        log_min_p = tl.where(
            by_ratio, log_of_normal(tl.maximum(tl.where(by_ratio, min_p, 1.0), _SMALLEST_NORMAL)), float("-inf")
        )
        if by_count | by_mass:
            copy_ptr = scratch_ptr + row.to(tl.int64) * (ROUNDS * BLOCK)
            cut = _order_key(largest - _CUT * tl.maximum(temperature, 1.0)).to(tl.int64)
            top_count, most, top_mass, mass = _gather_top(
                row_ptr, vocab_size, cut, copy_ptr, inv_temperature, max_z, ROUNDS, BLOCK
            )
            tl.debug_barrier()  # the copy is read by other threads than wrote it
            wanted = _mass_wanted(top_p, mass)
            # The best tokens answer for the row if all are in the copy and the threshold is certain to be among them.
            if (most <= ROUNDS) & tl.where(by_count, top_count >= top_k, top_mass >= wanted):
                low = tl.maximum(low, cut)
                threshold = _filter(
                    copy_ptr,
                    ROUNDS * BLOCK,
                    low,
                    high,
                    top_mass,
                    wanted,
                    by_count,
                    by_mass,
                    top_k,
                    top_p,
                    inv_temperature,
                    max_z,
                    log_min_p,
                    BLOCK,
                )
            else:
                threshold = _filter(
                    row_ptr,
                    vocab_size,
                    low,
                    high,
                    mass,
                    wanted,
                    by_count,
                    by_mass,
                    top_k,
                    top_p,
                    inv_temperature,
                    max_z,
                    log_min_p,
                    BLOCK,
                )
        else:
            threshold = _smallest_kept(row_ptr, vocab_size, low, inv_temperature, max_z, log_min_p, BLOCK)
    tl.store(min_logit_ptr + row, threshold + 0.0)  # -0 and +0 are one value


def thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Per row 1 / temperature (1 if greedy, IEEE division) and the smallest kept logit (-inf without filters).

    Every tensor is contiguous.
    """
    num_rows, vocab_size = logits.shape
    block, rounds = THRESHOLD_CONFIG["BLOCK"], THRESHOLD_CONFIG["ROUNDS"]
    if vocab_size > _MAX_BLOCKS * block:
        raise ValueError(f"sample: a vocabulary of {vocab_size} tokens; at most {_MAX_BLOCKS * block} are supported")
    inv_temperature = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    min_logit = torch.empty_like(inv_temperature)
    scratch = torch.empty((num_rows, rounds * block), dtype=torch.float32, device=logits.device)
    tensors = logits, temperature, top_k, top_p, min_p, inv_temperature, min_logit, scratch
    _launches(
        (num_rows, vocab_size, temperature.dtype, top_k.dtype, top_p.dtype, min_p.dtype),
        tensors,
        lambda: Call(
            _threshold_kernel,
            (num_rows,),
            (*tensors, vocab_size),
            {**THRESHOLD_CONFIG, "enable_fp_fusion": False},
        ),
    )
    return inv_temperature, min_logit
