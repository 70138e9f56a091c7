"""Places of the pairs of tokens and experts: a counting sort in which every place is a count, so nothing races.

Pairs are ranked among those of their expert in a chunk of consecutive pairs, and every chunk counts its pairs of each
expert; a place is the number of pairs of smaller experts, of its own in earlier chunks, and the rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

_rank, _scan, _place = Launches(), Launches(), Launches()

CHUNK, STEP = 128, 32  # pairs of a chunk; compared at a time
FEW_CHUNKS = 32  # whose counts every program adds up by itself
SCAN_CHUNKS, SCAN_EXPERTS = 256, 8


@triton.jit
def load_experts(experts_ptr, pairs, num_pairs, E):
    """Experts of pairs; E for a pair without one, or with one that does not exist."""
    expert = tl.load(experts_ptr + pairs, mask=pairs < num_pairs, other=-1)
    return tl.where((expert < 0) | (expert >= E), E, expert)


@triton.jit(do_not_specialize=["num_pairs"])
def rank_kernel(
    experts_ptr,  # (P,) int32
    ranks_ptr,  # (P,) int32
    counts_ptr,  # (chunks, BINS) int32
    num_pairs,
    E,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,  # more than E
):
    """Ranks, -1 without expert, and counts of one chunk."""
    start = tl.program_id(0) * CHUNK
    pairs = start + tl.arange(0, CHUNK)
    expert = load_experts(experts_ptr, pairs, num_pairs, E)
    rank = tl.zeros((CHUNK,), tl.int32)
    for step in range(0, CHUNK, STEP):
        others = start + step + tl.arange(0, STEP)
        other = load_experts(experts_ptr, others, num_pairs, E)
        before = (other[None, :] == expert[:, None]) & (others[None, :] < pairs[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(ranks_ptr + pairs, tl.where(expert < E, rank, -1), mask=pairs < num_pairs)
    tl.store(counts_ptr + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))


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


@triton.jit(do_not_specialize=["num_pairs", "num_chunks"])
def place_kernel(
    experts_ptr,  # (P,) int32, read where there is a rank
    counts_ptr,  # (chunks, BINS) int32: pairs of each expert in a chunk, or in the chunks before when SCANNED
    totals_ptr,  # (BINS,) int32 when SCANNED
    slots_ptr,  # (P,) int32: ranks, which become places
    rows_ptr,  # (P,) int32
    offsets_ptr,  # (E + 1,) int32
    num_pairs,
    num_chunks,
    E,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,  # CHUNK or the next power of two
    BINS: tl.constexpr,
    FEW_CHUNKS: tl.constexpr,
    SCANNED: tl.constexpr,
):
    """A chunk's places; the first one's program also writes the offsets."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    if SCANNED:
        total = tl.load(totals_ptr + bins, mask=bins < E, other=0)
        before = tl.load(counts_ptr + chunk * BINS + bins, mask=bins < E, other=0)
    else:
        chunks = tl.arange(0, FEW_CHUNKS)
        known = (chunks < num_chunks)[:, None] & (bins < E)[None, :]
        counts = tl.load(counts_ptr + chunks[:, None] * BINS + bins[None, :], mask=known, other=0)
        total = tl.sum(counts, 0)
        before = tl.sum(tl.where((chunks < chunk)[:, None], counts, 0), 0)
    past = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + bins, past, mask=bins < E)
    member = tl.arange(0, PAIRS)
    pairs = chunk * CHUNK + member
    here = (member < CHUNK) & (pairs < num_pairs)
    rank = tl.load(slots_ptr + pairs, mask=here, other=-1)
    taken = rank >= 0
    expert = tl.load(experts_ptr + pairs, mask=taken, other=0)
    place = tl.gather(past - total + before, expert, 0) + rank
    tl.store(slots_ptr + pairs, place, mask=taken)
    tl.store(rows_ptr + place, pairs, mask=taken)
    tl.store(rows_ptr + pairs, tl.zeros((PAIRS,), tl.int32), mask=here & (pairs >= tl.sum(total, 0)))


def forward(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(T, k) int32 contiguous -> rows (P,), slots (T, k), offsets (E+1,), all int32."""
    slots, chunks, bins = torch.empty_like(experts), cdiv(experts.numel(), CHUNK), bins_of(num_experts)
    counts = experts.new_empty(chunks, bins)
    if chunks:
        at, constants = (experts.numel(), num_experts), {"CHUNK": CHUNK, "STEP": STEP, "BINS": bins, "num_warps": 4}
        tensors = experts, slots, counts
        _rank(at, tensors, lambda: Call(rank_kernel, (chunks,), (*tensors, *at), constants))
    rows, offsets = place(experts, slots, counts, num_experts, CHUNK)
    return rows, slots, offsets


def bins_of(num_experts: int) -> int:
    """Width of a chunk's counts."""
    return max(32, SCAN_EXPERTS, next_power_of_2(num_experts + 1))


def place(experts: Tensor, slots: Tensor, counts: Tensor, num_experts: int, chunk: int) -> tuple[Tensor, Tensor]:
    """experts (T, k), counts (chunks, bins) of each ``chunk`` of pairs; ``slots`` (T, k) holds the ranks, and then the
    places -> rows (P,), offsets (E+1,)."""
    (chunks, bins), num_pairs = counts.shape, experts.numel()
    rows, offsets, totals = (experts.new_empty(n) for n in (num_pairs, num_experts + 1, bins))
    scanned = chunks > FEW_CHUNKS
    if scanned:
        scan = {"BINS": bins, "SCAN_CHUNKS": SCAN_CHUNKS, "SCAN_EXPERTS": SCAN_EXPERTS, "num_warps": 4}
        grid = (bins // SCAN_EXPERTS,)
        _scan((chunks, bins), (counts, totals), lambda: Call(scan_chunks_kernel, grid, (counts, totals, chunks), scan))
    tensors, at = (experts, counts, totals, slots, rows, offsets), (num_pairs, chunks, num_experts)
    constants = {
        **{"CHUNK": chunk, "PAIRS": next_power_of_2(chunk), "BINS": bins, "FEW_CHUNKS": FEW_CHUNKS},
        **{"SCANNED": scanned, "num_warps": 4},
    }
    _place((*at, chunk), tensors, lambda: Call(place_kernel, (max(1, chunks),), (*tensors, *at), constants))
    return rows, offsets
