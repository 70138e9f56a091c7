"""Arguments whose numbers have gaps between them, as columns of a table have: kernels that walk memory must not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from rowwise import DEVICE, randn, same_bits
from torch import Tensor

from vexact.ops.kernels import linear, logprob, rms_norm, sampling
from vexact.ops.kernels.attention import write_kv
from vexact.ops.kernels.rotary import qk_norm_rope, rope_to_cache

TOKENS, HEADS, KV_HEADS, DIM = 5, 4, 2, 16
Spread = Callable[[Tensor], Tensor]


def with_gaps(x: Tensor) -> Tensor:
    """The same values, every other number of a wider tensor whose other ones are another value."""
    spread = torch.stack((x, torch.full_like(x, 7)), -1)[..., 0]
    assert spread.stride(-1) == 2
    return spread


def of(*values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def linear_bias(spread: Spread) -> Any:
    x, weight, bias = randn(TOKENS, 32, seed=1), randn(48, 32, seed=2), randn(48, seed=3)
    return linear.forward(x, weight, spread(bias), x.dtype)


def norm_weight(spread: Spread) -> Any:
    x, weight = randn(TOKENS, 32, seed=1), spread(randn(32, seed=2))
    y, rstd = rms_norm.forward(x, weight, 1e-6)
    return y, *rms_norm.add_forward(x, x, weight, 1e-6), *rms_norm.backward(y, x, weight, rstd)


def scored_logits(spread: Spread) -> Any:
    tokens, factors = torch.arange(TOKENS, device=DEVICE), torch.full((TOKENS,), 0.7, device=DEVICE)
    return logprob.token_logprobs(spread(randn(TOKENS, 200, seed=1)), *map(spread, (tokens, factors, factors - 1)))


def sampling_settings(spread: Spread) -> Any:
    temperature, top_p, min_p = of(0.5, 0.0, 1.0, 1.5, 0.9), of(0.9, 1.0, 0.5, 1.0, 0.7), of(0.0, 0.1, 0.0, 0.3, 0.0)
    top_k, seed = of(3, -1, 5, 2, 0, dtype=torch.int32), torch.arange(TOKENS, device=DEVICE)
    settings = temperature, top_k, top_p, min_p, seed, seed + 9
    return sampling.sample(spread(randn(TOKENS, 200, seed=1)), *map(spread, settings))


def rotation() -> tuple[Tensor, ...]:
    q, k, v = (randn(TOKENS, count, DIM, seed=count) for count in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, torch.arange(TOKENS, device=DEVICE), randn(10, DIM, seed=9)


def pages() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, 4, KV_HEADS, DIM, device=DEVICE), torch.zeros(3, 4, KV_HEADS, DIM, device=DEVICE)


def head_weights(spread: Spread) -> Any:
    q, k, _, positions, table = map(spread, rotation())
    return qk_norm_rope.forward(q, k, spread(randn(DIM, seed=5)), spread(randn(DIM, seed=6)), 1e-6, positions, table)


def rotated_pages(spread: Spread, norm: bool) -> Any:
    (q, k, v, positions, table), cache = map(spread, rotation()), pages()
    weights = (spread(randn(DIM, seed=5)), spread(randn(DIM, seed=6))) if norm else (None, None)
    slots = spread(of(0, 3, -1, 7, 9, dtype=torch.int64))
    return rope_to_cache.forward(q, k, v, *weights, 1e-6, positions, table, *cache, slots), *cache


def written_pages(spread: Spread) -> Any:
    (_, k, v, *_), cache = rotation(), pages()
    write_kv(spread(k), spread(v), *cache, spread(of(0, 3, -1, 7, 9, dtype=torch.int64)))
    return cache


@pytest.mark.parametrize(
    "results",
    [
        linear_bias,
        norm_weight,
        scored_logits,
        sampling_settings,
        head_weights,
        partial(rotated_pages, norm=True),
        partial(rotated_pages, norm=False),
        written_pages,
    ],
)
def test_gaps_between_numbers_are_not_read(results: Callable[[Spread], Any]) -> None:
    expected, found = results(Tensor.contiguous), results(with_gaps)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (expected, found)), strict=True):
        assert same_bits(one, other)


def test_one_number_for_all_rows_is_read_as_it_is() -> None:
    """``expand`` lets all rows share a number: the next ones in memory are somebody else's."""
    logits, rows = randn(TOKENS, 200, seed=1), torch.full((TOKENS,), 3, device=DEVICE)
    shared = of(0.8), of(5, dtype=torch.int32), of(0.9), of(0.05), of(1, dtype=torch.int64)
    expected = sampling.sample(logits, *(x.repeat(TOKENS) for x in shared), rows)
    for one, other in zip(expected, sampling.sample(logits, *(x.expand(TOKENS) for x in shared), rows)):
        assert same_bits(one, other)
