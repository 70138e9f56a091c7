"""Embedding kernels: the gather is a copy, and the gradient is a sum in token order."""

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
def test_backward_adds_tokens_in_order(dtype: torch.dtype, width: int) -> None:
    dy, ids = randn(61, width, seed=2, dtype=dtype), token_ids(61, 19)
    with poisoned_outputs():
        grad = kernel.backward(dy, ids, 19)
    assert same_bits(grad.cpu(), in_token_order(dy, ids, 19))
    assert torch.allclose(grad.cpu().float(), twin.backward(dy.cpu(), ids.cpu(), 19).float(), rtol=1e-2, atol=1e-3)


def test_backward_of_one_repeated_token_and_of_none() -> None:
    dy = randn(40, 33, seed=3)
    ids = torch.full((40,), 2, device=DEVICE)
    assert same_bits(kernel.backward(dy, ids, 4).cpu(), in_token_order(dy, ids, 4))
    assert same_bits(kernel.backward(dy[:0], ids[:0], 4), torch.zeros(4, 33, device=DEVICE))


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
