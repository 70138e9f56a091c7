"""Embedding kernels: the gather is a copy, and the gradient is a sum in an order of its own."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from torch import Tensor

from vexact.ops.cpu import embedding as twin
from vexact.ops.kernels import embedding as kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def token_ids(count: int, vocab_size: int) -> Tensor:
    """Ids with long runs of one value, as padding and line ends give, and some never seen."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, vocab_size, (count,), generator=generator)
    ids[torch.rand(count, generator=generator) < 0.4] = vocab_size // 2
    return ids.to(DEVICE)


def in_token_order(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """One fp32 addition per token, first to last, rounded at the end."""
    total = torch.zeros(num_rows, dy.shape[1], dtype=torch.float32)
    for token, row in enumerate(ids.tolist()):
        total[row] += dy[token].float().cpu()
    return total.to(dy.dtype)


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
    assert same_bits(grad.cpu(), in_token_order(dy, ids, 23))
    assert torch.allclose(grad.cpu().float(), twin.backward(dy.cpu(), ids.cpu(), 23).float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [4, 5, 36, 37, 100])
def test_backward_of_one_token_many_times(dtype: torch.dtype, repeats: int) -> None:
    """The sum is right to one rounding, and the same whatever other tokens lie between."""
    dy = randn(repeats, 33, seed=3, dtype=dtype)
    alone = kernel.backward(dy, torch.full((repeats,), 2, device=DEVICE), 4)
    expected = dy.double().sum(0).to(dtype).float()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(alone[2].float(), expected, rtol=0, atol=tolerance)
    assert not alone[[0, 1, 3]].any()
    mixed = torch.cat([randn(7, 33, seed=4, dtype=dtype), dy]).flip(0)
    ids = torch.tensor([2] * repeats + [0, 1, 3, 1, 0, 3, 3], device=DEVICE)
    shuffled = kernel.backward(mixed.contiguous(), ids, 4)
    again = kernel.backward(dy.flip(0).contiguous(), ids[:repeats], 4)
    assert same_bits(shuffled[2], again[2])


def test_backward_of_no_token() -> None:
    nothing = kernel.backward(randn(0, 33, seed=3), torch.zeros(0, dtype=torch.int64, device=DEVICE), 4)
    assert same_bits(nothing, torch.zeros(4, 33, device=DEVICE))


def test_ids_outside_the_table_are_seen_and_never_written() -> None:
    weight = randn(4, 33, seed=1)
    ids = torch.tensor([0, -1, 4, 3, -1], device=DEVICE)
    out = kernel.forward(ids, weight)
    assert torch.equal(out.isnan().all(1), torch.tensor([False, True, True, False, True], device=DEVICE))
    assert torch.equal(out[[0, 3]], weight[[0, 3]])
    dy = randn(5, 33, seed=2)
    expected = torch.zeros(4, 33, device=DEVICE)
    expected[[0, 3]] = dy[[0, 3]]
    assert same_bits(kernel.backward(dy, ids, 4), expected)
