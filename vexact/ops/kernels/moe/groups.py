"""Places of the pairs of tokens and experts: a counting sort in which every place is a count, so nothing races.

A pair's key is expert * P + pair; keys are distinct, and a place is the number of smaller keys. Few pairs are compared
with all others. Many are counted by expert in chunks first, and compared within their chunk alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.sizes import cdiv, next_power_of_2

FEW_PAIRS = 4096
QUERIES, CHUNK, STEP = 64, 512, 128  # pairs of a program of few; of many; compared at a time
SCAN_CHUNKS, SCAN_EXPERTS = 32, 32


@triton.jit
def load_experts(experts_ptr, pairs, num_pairs, E):
    """Experts of pairs; E for a pair without one, or with one that does not exist."""
    expert = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1)
    return tl.where((expert < 0) | (expert >= E), E, expert)


@triton.jit
def store_places(rows_ptr, slots_ptr, pairs, expert, place, num_pairs, E):
    """A pair without expert takes a place behind all others, which stays empty."""
    taken = expert < E
    tl.store(slots_ptr + pairs, tl.where(taken, place, -1), mask=pairs < num_pairs)
    tl.store(rows_ptr + place, tl.where(taken, pairs, 0), mask=pairs < num_pairs)


@triton.jit(do_not_specialize=["num_pairs"])
def group_few_kernel(
    experts_ptr,  # (P,) int32
    rows_ptr,  # (P,) int32
    slots_ptr,  # (P,) int32
    offsets_ptr,  # (E + 1,) int32
    num_pairs,
    E,
    QUERIES: tl.constexpr,
    STEP: tl.constexpr,
):
    """QUERIES pairs, or behind all pairs the offsets of as many experts: the same count of smaller keys."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    pair_blocks = tl.cdiv(num_pairs, QUERIES)
    is_pair = tl.program_id(0) < pair_blocks
    expert = query - pair_blocks * QUERIES
    key = expert * num_pairs
    if is_pair:
        expert = load_experts(experts_ptr, query, num_pairs, E)
        key = expert * num_pairs + query
    count = tl.zeros((QUERIES,), tl.int32)
    for start in range(0, num_pairs, STEP):
        others = start + tl.arange(0, STEP)
        other = load_experts(experts_ptr, others, num_pairs, E)
        smaller = (other * num_pairs + others)[None, :] < key[:, None]
        count += tl.sum((smaller & (others < num_pairs)[None, :]).to(tl.int32), 1)
    if is_pair:
        store_places(rows_ptr, slots_ptr, query, expert, count, num_pairs, E)
    else:
        tl.store(offsets_ptr + expert, count, mask=expert <= E)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(experts_ptr, counts_ptr, num_pairs, E, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """counts (chunks, BINS): pairs of each expert in a chunk, in bin E those without."""
    pairs = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = load_experts(experts_ptr, pairs, num_pairs, E)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(expert, BINS)
    padding = tl.sum((pairs >= num_pairs).to(tl.int32), 0)
    tl.store(counts_ptr + tl.program_id(0) * BINS + bins, counts - tl.where(bins == E, padding, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def scan_chunks_kernel(
    counts_ptr, totals_ptr, num_chunks, BINS: tl.constexpr, SCAN_CHUNKS: tl.constexpr, SCAN_EXPERTS: tl.constexpr
):
    """In place: counts of the chunks before; totals (BINS,) of all chunks."""
    bins = tl.program_id(0) * SCAN_EXPERTS + tl.arange(0, SCAN_EXPERTS)
    total = tl.zeros((SCAN_EXPERTS,), tl.int32)
    for start in range(0, num_chunks, SCAN_CHUNKS):
        chunks = start + tl.arange(0, SCAN_CHUNKS)
        at = counts_ptr + chunks[:, None] * BINS + bins[None, :]
        here = tl.load(at, mask=(chunks < num_chunks)[:, None], other=0)
        tl.store(at, total[None, :] + tl.cumsum(here, 0) - here, mask=(chunks < num_chunks)[:, None])
        total += tl.sum(here, 0)
    tl.store(totals_ptr + bins, total)


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    experts_ptr,  # (P,) int32
    before_ptr,  # (chunks, BINS) int32: pairs of each expert in the chunks before
    totals_ptr,  # (BINS,) int32
    rows_ptr,  # (P,) int32
    slots_ptr,  # (P,) int32
    offsets_ptr,  # (E + 1,) int32
    num_pairs,
    E,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):
    """A pair's place: pairs of smaller experts, those of its own in the chunks before, and in this one before it."""
    start = tl.program_id(0) * CHUNK
    pairs = start + tl.arange(0, CHUNK)
    expert = load_experts(experts_ptr, pairs, num_pairs, E)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_ptr + bins)
    begin = tl.cumsum(totals, 0) - totals
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + bins, begin, mask=bins <= E)
    place = tl.gather(begin, expert, 0) + tl.load(before_ptr + tl.program_id(0) * BINS + expert)
    for step in range(0, CHUNK, STEP):
        others = start + step + tl.arange(0, STEP)
        other = load_experts(experts_ptr, others, num_pairs, E)
        before = (other[None, :] == expert[:, None]) & (others[None, :] < pairs[:, None])
        place += tl.sum(before.to(tl.int32), 1)
    store_places(rows_ptr, slots_ptr, pairs, expert, place, num_pairs, E)


def forward(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, k) int32 contiguous -> rows (P,), slots (T, k), offsets (E+1,), all int32."""
    num_pairs, device = experts.numel(), experts.device
    rows, slots = torch.empty(num_pairs, dtype=torch.int32, device=device), torch.empty_like(experts)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    if num_pairs <= FEW_PAIRS:
        grid = cdiv(num_pairs, QUERIES) + cdiv(num_experts + 1, QUERIES)
        group_few_kernel[(grid,)](
            experts, rows, slots, offsets, num_pairs, num_experts, QUERIES=QUERIES, STEP=STEP, num_warps=4
        )
        return rows, slots, offsets
    chunks, bins = cdiv(num_pairs, CHUNK), max(SCAN_EXPERTS, next_power_of_2(num_experts + 1))
    counts, totals = rows.new_empty(chunks, bins), rows.new_empty(bins)
    count_kernel[(chunks,)](experts, counts, num_pairs, num_experts, CHUNK=CHUNK, BINS=bins, num_warps=4)
    scan = {"SCAN_CHUNKS": SCAN_CHUNKS, "SCAN_EXPERTS": SCAN_EXPERTS}
    scan_chunks_kernel[(bins // SCAN_EXPERTS,)](counts, totals, chunks, BINS=bins, **scan, num_warps=4)
    at = experts, counts, totals, rows, slots, offsets, num_pairs, num_experts
    place_kernel[(chunks,)](*at, CHUNK=CHUNK, STEP=STEP, BINS=bins, num_warps=4)
    return rows, slots, offsets
