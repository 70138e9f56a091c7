"""The router: whom it chooses, above all among equals, and with which weights; its gradient; its digest."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from vexact.ops import Routes, route
from vexact.ops.cpu.moe.router import _order_keys
from vexact.ops.moe.digest import digest_of
from vexact.ops.moe.route import route_reference

SETTINGS = [
    {"top_k": 2},
    {"top_k": 8, "normalize": False},
    {"top_k": 1},
    {"top_k": 16, "scale": 0.5},
    {"top_k": 3, "num_groups": 4, "top_groups": 2, "normalize": False},
    {"top_k": 6, "scoring": "sigmoid", "scale": 2.446},
    {"top_k": 4, "scoring": "sigmoid", "num_groups": 4, "top_groups": 1, "scale": 2.5},
    {"top_k": 8, "scoring": "sigmoid", "num_groups": 8, "top_groups": 4, "normalize": False},
    {"top_k": 1, "scoring": "sigmoid", "num_groups": 2, "top_groups": 2},
]


def chosen(values: list[float], top_k: int, num_groups: int, top_groups: int, best: int) -> list[int]:
    """By the definition, in Python; ``best`` values of a group make its score."""

    def first(scores: list[float], count: int, candidates: list[int]) -> list[int]:
        return sorted(candidates, key=lambda i: (-scores[i], i))[:count]

    size = len(values) // num_groups
    groups = [values[g * size : (g + 1) * size] for g in range(num_groups)]
    scores = [sum(sorted(group)[-best:]) for group in groups]
    kept = first(scores, top_groups, list(range(num_groups)))
    return sorted(first(values, top_k, [i for i in range(len(values)) if i // size in kept]))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_choice_and_weights_are_those_of_the_definition(settings: dict, with_bias: bool) -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(200, 16) * 3, torch.randn(16) * 0.2 if with_bias else None
    routes, expected = route(logits, bias, **settings), route_reference(logits, bias, **settings)
    assert routes.experts.dtype == torch.int32
    assert torch.equal(routes.experts, expected.experts)
    torch.testing.assert_close(routes.weights.double(), expected.weights, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("scoring") == "sigmoid"], ids=str)
def test_ties_go_to_the_lower_index_in_experts_and_in_groups(settings: dict) -> None:
    """All scores are 1/2 and the bias a multiple of 1/4, so that every sum is exact and most of them are equal."""
    num_groups, top_groups = settings.get("num_groups", 1), settings.get("top_groups", 1)
    generator, ties = torch.Generator().manual_seed(1), 0
    for _ in range(100):
        bias = torch.randint(-3, 3, (16,), generator=generator) * 0.25
        values = (bias + 0.5).tolist()
        experts = route(torch.zeros(2, 16), bias, **settings).experts.tolist()
        assert experts == [chosen(values, settings["top_k"], num_groups, top_groups, best=2)] * 2
        ties += len(set(values)) < 16
    assert ties == 100


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("scoring") != "sigmoid"], ids=str)
def test_ties_of_a_softmax_go_to_the_lower_index(settings: dict) -> None:
    num_groups, top_groups = settings.get("num_groups", 1), settings.get("top_groups", 1)
    logits = torch.randint(-1, 2, (200, 16), generator=torch.Generator().manual_seed(1)).float()
    for row, experts in zip(logits.tolist(), route(logits, **settings).experts.tolist(), strict=True):
        assert experts == chosen(row, settings["top_k"], num_groups, top_groups, best=1)


def test_minus_zero_ties_with_zero_and_nan_comes_first() -> None:
    values = [-math.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 0.5, 3e38, math.inf, math.nan]
    keys = _order_keys(torch.tensor(values)).tolist()
    assert keys == sorted(set(keys))
    assert _order_keys(torch.tensor([-0.0, -math.nan])).tolist() == [keys[4], keys[-1]]
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0)).int()
    numbers = bits.view(torch.float32)
    numbers = numbers[~numbers.isnan()]
    order = _order_keys(numbers).argsort()
    assert (numbers[order].diff() >= 0).logical_or(numbers[order][1:].isinf()).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_whatever_the_logits_experts_are_distinct_and_in_range(settings: dict, odd: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 16)
    logits[torch.rand(64, 16) < 0.2] = odd
    logits[:2] = odd
    for bias in (None, torch.randn(16), torch.full((16,), odd)):
        experts = route(logits, bias, **settings).experts
        assert (experts >= 0).all()
        assert (experts < 16).all()
        assert (experts.diff() > 0).all()
        assert torch.equal(experts, torch.cat([route(row, bias, **settings).experts for row in logits.split(1)]))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_logit_that_is_no_number_shows_in_the_weights(settings: dict) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 16)
    logits[torch.rand(64, 16) < 0.05] = math.nan
    for bias in (None, torch.randn(16)):
        weights = route(logits, bias, **settings).weights
        assert torch.equal(weights.isnan().any(1), logits.isnan().any(1))
    first = slice(0, settings["top_k"])
    everything = route(torch.full((1, 16), math.nan), **settings).experts[0].tolist()
    assert everything == list(range(16))[first]


def test_experts_outside_the_best_groups_lose_to_minus_infinity() -> None:
    bias = torch.full((8,), -math.inf)
    bias[4] = 0.0
    settings = {"top_k": 4, "num_groups": 2, "top_groups": 1}
    assert route(torch.zeros(1, 8), bias, **settings).experts.tolist() == [[4, 5, 6, 7]]
    bias[4:6] = 0.0
    assert route(torch.zeros(1, 8), bias, scoring="sigmoid", **settings).experts.tolist() == [[4, 5, 6, 7]]


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    routes = route(logits, torch.tensor([9.0, 9.0, 0.0, 0.0]), top_k=2, scoring="sigmoid", normalize=False)
    assert routes.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(routes.weights, torch.sigmoid(logits[:, :2]))


def test_small_scores_are_accurate_until_they_are_zero() -> None:
    logits = -torch.linspace(0, 86, 400).unsqueeze(1)
    both = torch.cat((torch.zeros_like(logits), logits), dim=1)
    softmax = route(both, top_k=2, normalize=False).weights[:, 1:]
    torch.testing.assert_close(softmax.double(), both.double().softmax(1)[:, 1:], rtol=1e-5, atol=0)
    sigmoid = route(logits, top_k=1, scoring="sigmoid", normalize=False).weights
    torch.testing.assert_close(sigmoid.double(), logits.double().sigmoid(), rtol=1e-5, atol=0)
    far = torch.tensor([[0.0, -87.5, -math.inf]])
    assert route(far, top_k=3, normalize=False).weights.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_at_the_end(dtype: torch.dtype) -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    exact = route(logits, top_k=3, scale=1.5).weights
    rounded = route(logits, top_k=3, scale=1.5, round_to=dtype).weights
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.to(dtype).float())
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_those_of_the_reference(settings: dict) -> None:
    torch.manual_seed(0)
    logits, bias = (torch.randn(40, 16) * 2).requires_grad_(), torch.randn(16) * 0.1
    wide = logits.detach().double().requires_grad_()
    dweights = torch.randn(40, settings["top_k"])
    (route(logits, bias, round_to=torch.float32, **settings).weights * dweights).sum().backward()
    (route_reference(wide, bias, **settings).weights * dweights).sum().backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-7)


def test_normalised_weights_give_no_gradient_to_who_was_not_chosen() -> None:
    logits = torch.randn(30, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for scoring in ("softmax", "sigmoid"):
        experts, weights = route(logits, top_k=3, scoring=scoring)
        (grad,) = torch.autograd.grad((weights * torch.tensor([1.0, -2.0, 0.5])).sum(), logits)
        assert grad.gather(1, experts.long()).all()
        assert not grad.scatter(1, experts.long(), 0.0).any()


def test_gradients_pass_through_the_rounding_as_if_there_were_none() -> None:
    logits, dweights = torch.randn(10, 8), torch.randn(10, 2)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = logits.clone().requires_grad_()
        (route(leaf, top_k=2, round_to=dtype).weights * dweights).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_token_is_routed_alike_in_every_batch_and_layout() -> None:
    torch.manual_seed(0)
    wide, bias = torch.randn(60, 26), torch.randn(13)
    logits = wide[:, ::2]
    assert not logits.is_contiguous()
    for settings in ({"top_k": 3}, {"top_k": 5, "scoring": "sigmoid"}):
        whole = route(logits, bias, **settings)
        for rows in (slice(0, 1), slice(59, 60), slice(7, 40), slice(0, 0)):
            part = route(logits[rows].contiguous(), bias, **settings)
            assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def _digests(experts: Tensor, salt: int) -> list[int]:
    return digest_of(experts, salt).tolist()


def test_digests_are_equal_for_equal_sets_only() -> None:
    sets = torch.tensor(list(combinations(range(12), 4)), dtype=torch.int32)
    seen = _digests(sets, 0) + _digests(sets, 1) + _digests(sets[:, :3], 0)[:1]
    assert len(set(seen)) == len(seen)
    assert _digests(sets.flip(0), 0) == _digests(sets, 0)[::-1]


def test_digest_is_the_written_formula() -> None:
    """In Python's integers, so that any device can be held against it."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            x = (x ^ (x >> 33)) * multiplier & mask
        return x ^ (x >> 33)

    def expected(experts: list[int], salt: int) -> int:
        state = (salt + 1) * 0x9E3779B97F4A7C15 & mask
        for expert in experts:
            state = mix(state + (expert + 1) * 0xD1B54A32D192ED03 & mask)
        return state - (1 << 64) if state >> 63 else state

    experts = torch.randint(0, 4000, (300, 5), generator=torch.Generator().manual_seed(0)).sort(1).values
    for salt in (0, 1, 46, 2**31 - 1):
        assert _digests(experts, salt) == [expected(row, salt) for row in experts.tolist()]


def test_digests_of_layers_add_up_in_place() -> None:
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    digest, kept = torch.zeros(20, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    for salt in (3, 0):
        routes: Routes = route(logits, top_k=2, digest=digest[5:14], salt=salt)
        kept += digest_of(routes.experts, salt)
    assert torch.equal(digest[5:14], kept)
    assert not digest[:5].any()
    assert not digest[14:].any()
