"""Embedding kernels: the gather is a copy, and the gradient is a sum in an order of its own."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from torch import Tensor

from vexact.ops.cpu import embedding as twin
from vexact.ops.kernels import embedding as kernel
from vexact.ops.kernels.embedding.grad import _SEGMENT as SEGMENT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def token_ids(count: int, vocab_size: int) -> Tensor:
    """Ids with long runs of one value, as padding and line ends give, and some never seen."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, vocab_size, (count,), generator=generator)
    ids[torch.rand(count, generator=generator) < 0.4] = vocab_size // 2
    return ids.to(DEVICE)


def in_segments(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """The documented order: fp32 sums of a row's tokens by segment, added up first to last, and rounded at the end."""
    out = torch.zeros(num_rows, dy.shape[1], dtype=torch.float32)
    for row in range(num_rows):
        tokens = dy[ids == row].float().cpu()
        for segment in tokens.split(SEGMENT) if len(tokens) else ():
            total = torch.zeros(dy.shape[1])
            for token in segment:
                total += token
            out[row] += total
    return out.to(dy.dtype)


def shuffled(ids: Tensor, seed: int) -> Tensor:
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 576, 2560])
def test_forward_copies_rows(dtype: torch.dtype, width: int) -> None:
    weight, ids = randn(13, width, seed=1, dtype=dtype), token_ids(20, 13)
    with poisoned_outputs():
        out = kernel.forward(ids, weight)
    assert same_bits(out, weight[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 576])
def test_backward_adds_a_few_tokens_in_order(dtype: torch.dtype, width: int) -> None:
    ids = torch.arange(57, device=DEVICE) % 19  # every id three times
    dy = randn(57, width, seed=2, dtype=dtype)
    with poisoned_outputs():
        grad = kernel.backward(dy, ids, 23)
    assert same_bits(grad.cpu(), in_segments(dy, ids, 23))
    assert torch.allclose(grad.cpu().float(), twin.backward(dy.cpu(), ids.cpu(), 23).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 5 * SEGMENT + 3])
def test_backward_of_one_token_many_times(dtype: torch.dtype, repeats: int) -> None:
    """The sum is in segments, right to one rounding, and the same whatever other tokens lie between."""
    dy = randn(repeats, 33, seed=3, dtype=dtype)
    alone = kernel.backward(dy, torch.full((repeats,), 2, device=DEVICE), 4)
    assert same_bits(alone[2].cpu(), in_segments(dy, torch.full((repeats,), 2, device=DEVICE), 4)[2])
    expected = dy.double().sum(0).to(dtype).float()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(alone[2].float(), expected, rtol=0, atol=tolerance)
    assert not alone[[0, 1, 3]].any()
    for others in (7, SEGMENT, 3 * SEGMENT + 1):
        ids = shuffled(torch.tensor([2] * repeats + [(0, 1, 3)[i * i % 3] for i in range(others)]), others)
        mixed = randn(repeats + others, 33, seed=4, dtype=dtype)
        mixed[ids == 2] = dy
        assert same_bits(kernel.backward(mixed, ids, 4)[2], alone[2])


@pytest.mark.parametrize(
    "runs",
    [
        (5, SEGMENT + 1, SEGMENT + 3, 2, 2 * SEGMENT, 1),  # long runs that meet inside a window
        (SEGMENT, 2 * SEGMENT, SEGMENT, SEGMENT + 1),  # and at a window's edge
        (3 * SEGMENT - 1, SEGMENT + 1, 40 * SEGMENT),  # and more segments than are in flight
        (SEGMENT - 1, 1, 3 * SEGMENT + 1),
    ],
)
@pytest.mark.parametrize("outside", [0, 1, 2 * SEGMENT + 1])
def test_backward_of_adjacent_runs(runs: tuple[int, ...], outside: int) -> None:
    """``outside`` tokens that are not in the table lie before and after the runs, and shift them against windows."""
    runs_of = torch.tensor((outside, *runs, outside))
    ids = shuffled(torch.repeat_interleave(torch.arange(len(runs_of)) - 1, runs_of), 1)
    dy = randn(len(ids), 33, seed=5)
    with poisoned_outputs():
        grad = kernel.backward(dy, ids, len(runs))
    assert same_bits(grad.cpu(), in_segments(dy, ids, len(runs)))


def test_backward_of_random_runs() -> None:
    """Zipf-like ids, several column blocks, and ids that are not contiguous."""
    generator = torch.Generator().manual_seed(6)
    ids = (300 ** torch.rand(700, generator=generator)).long().to(DEVICE)
    strided = torch.stack((ids, ids), 1)[:, 0]
    dy = randn(700, 2100, seed=6, dtype=torch.bfloat16)
    with poisoned_outputs():
        grad = kernel.backward(dy, strided, 301)
    assert same_bits(grad.cpu(), in_segments(dy, ids, 301))


def test_backward_of_no_token() -> None:
    nothing = kernel.backward(randn(0, 33, seed=3), torch.zeros(0, dtype=torch.int64, device=DEVICE), 4)
    assert same_bits(nothing, torch.zeros(4, 33, device=DEVICE))


def test_ids_outside_the_table_are_seen_and_never_written() -> None:
    weight = randn(4, 33, seed=1)
    ids = torch.tensor([0, -1, 4, 3, 2**40], device=DEVICE)
    out = kernel.forward(ids, weight)
    assert torch.equal(out.isnan().all(1), torch.tensor([False, True, True, False, True], device=DEVICE))
    assert torch.equal(out[[0, 3]], weight[[0, 3]])
    dy = randn(5, 33, seed=2)
    expected = torch.zeros(4, 33, device=DEVICE)
    expected[[0, 3]] = dy[[0, 3]]
    assert same_bits(kernel.backward(dy, ids, 4), expected)
