"""The warp-specialised forward on a GPU: its bits are those of the Triton kernels, packed and over pages.

Most of the time goes to compiling some sixty kernels: `pytest -n 8` shares that out.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from attention_inputs import Batch, Pages, cumulative, make_batch, make_pages, same_bits
from hopper_inputs import EDGES, LATENT, LENGTHS, WIDE, on_a_hopper, shorter
from torch import Tensor

from vexact.ops.kernels.attention import packed_forward, paged_forward

GPU_LENGTHS = LENGTHS | {
    "tile edges": ([*EDGES, 700, 128, 63, 129, 191, 193],) * 2,
    "chunk edges": ([5000, 777, 2047, 2048, 2049, 2176, 4097],) * 2,
    "many short": ([length % 61 for length in range(600)],) * 2,
}


GPU_HEADS = [
    ((128, 128), (4, 2), torch.bfloat16), ((64, 64), (9, 3), torch.bfloat16), ((128, 128), (2, 2), torch.float16),
    (LATENT, (4, 4), torch.bfloat16), (WIDE, (4, 2), torch.bfloat16),
]  # fmt: skip


CASES = [
    *((GPU_HEADS[0], name, causal) for name in GPU_LENGTHS for causal in (True, False)),
    *((kind, name, True) for kind in GPU_HEADS[1:] for name in ("tile edges", "chunk edges", "many short")),
    *((kind, "more keys", False) for kind in GPU_HEADS[1:]),
]


@on_a_hopper
@pytest.mark.parametrize(("kind", "name", "causal"), CASES)
def test_bits_are_those_of_the_triton_kernels(kind, name, causal):
    dims, heads, dtype = kind
    batch = make_batch(*GPU_LENGTHS[name], heads=heads, dims=dims, dtype=dtype)
    expected = packed_forward(*batch.arguments, causal, specialised=False)
    for _ in range(3):
        assert same_bits(packed_forward(*batch.arguments, causal, specialised=True), expected)


def run_pages(batch: Batch, pages: Pages, causal: bool, specialised: bool) -> tuple[Tensor, Tensor]:
    used = torch.tensor(batch.k_lens, dtype=torch.int32, device="cuda")
    rows, longest = (batch.q, pages.k_cache, pages.v_cache), (max(batch.q_lens), max(batch.k_lens))
    return paged_forward(
        *rows, batch.cu_q, used, pages.table, *longest, batch.scale, causal, specialised=specialised
    )  # fmt: skip


PAGED_LENGTHS = GPU_LENGTHS | {
    "chunks of prompts": ([512, 130, 1, 64, 1, 700], [2560, 4097, 3000, 64, 17, 701]),
}
# Page sizes: several boxes in a tile, a part of a page, pages that no tile divides.
PAGED_CASES = [
    *((GPU_HEADS[0], name, 16, True) for name in PAGED_LENGTHS),
    *((GPU_HEADS[0], "chunks of prompts", size, True) for size in (8, 48, 256)),
    (GPU_HEADS[0], "chunk edges", 16, False),
    *((kind, "chunks of prompts", 16, True) for kind in GPU_HEADS[1:]),
]


@on_a_hopper
@pytest.mark.parametrize(("kind", "name", "page_size", "causal"), PAGED_CASES)
def test_bits_over_pages_are_those_of_the_triton_kernels(kind, name, page_size, causal):
    """Unused slots are NaN, table entries that hold no key -1. Packed rows have these bits as well."""
    dims, heads, dtype = kind
    batch = make_batch(*PAGED_LENGTHS[name], heads=heads, dims=dims, dtype=dtype)
    pages = make_pages(batch, page_size)
    expected = run_pages(batch, pages, causal, False)
    assert same_bits(packed_forward(*batch.arguments, causal, specialised=True), expected)
    for _ in range(3):
        assert same_bits(run_pages(batch, pages, causal, True), expected)


@on_a_hopper
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), LATENT, WIDE])
def test_rows_of_no_sequence_are_cleared_and_do_not_reach_others(dims):
    batch = make_batch([333, 95], [333, 95], heads=(4, 2), dims=dims)
    expected = packed_forward(*batch.arguments, True, specialised=False)
    longer = shorter(batch)
    for out, lse in (
        packed_forward(*longer.arguments, True, specialised=True),
        run_pages(longer, make_pages(batch, 16), True, True),
    ):
        assert same_bits((out[:428], lse[:428]), expected)
        assert not out[428:].any()
        assert torch.all(lse[428:] == float("-inf"))


def check_replays(call: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...]) -> None:
    """A captured call gives the expected bits in every replay."""
    assert same_bits(call(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert same_bits(captured, expected)


@on_a_hopper
@pytest.mark.parametrize("dims", [(128, 128), LATENT, WIDE])
def test_heads_with_gaps_are_read_in_place_and_a_captured_call_repeats(dims):
    lengths = [*random.Random(0).choices(range(1, 900), k=12), 2300]
    batch = make_batch(lengths, lengths, heads=(4, 2), dims=dims)
    expected = packed_forward(*batch.arguments, True, specialised=False)
    wide = torch.cat([batch.q, batch.k], 1)
    views = *wide.split([4, 2], 1), torch.cat([batch.v, batch.v], -1)[..., dims[1] :]
    cu = cumulative(lengths)
    run = (*views, cu, cu, max(lengths), max(lengths), batch.scale, True)
    check_replays(lambda: packed_forward(*run, specialised=True), expected)


@on_a_hopper
@pytest.mark.parametrize("dims", [(128, 128), LATENT])
def test_a_captured_call_over_pages_repeats_and_reads_caches_with_gaps(dims):
    batch = make_batch(*PAGED_LENGTHS["chunks of prompts"], heads=(4, 2), dims=dims)
    pages = make_pages(batch, 16)
    expected = run_pages(batch, pages, True, False)
    both = torch.cat([pages.k_cache, pages.v_cache], -1)  # keys and values of a head side by side
    gaps = Pages(both[..., : dims[0]], both[..., dims[0] :], pages.table)
    used = torch.tensor(batch.k_lens, dtype=torch.int32, device="cuda")
    longest = max(batch.q_lens), max(batch.k_lens)
    run = batch.q, gaps.k_cache, gaps.v_cache, batch.cu_q, used, gaps.table, *longest, batch.scale, True
    check_replays(lambda: paged_forward(*run, specialised=True), expected)
