"""Router, counting sort and combine: the kernels' bits are those of the CPU twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from torch import Tensor

from vexact.ops.cpu.moe import combine as combine_twin
from vexact.ops.cpu.moe import groups as groups_twin
from vexact.ops.cpu.moe import router as router_twin
from vexact.ops.kernels.moe import combine, groups, router

BF16 = torch.bfloat16
# NaN and infinities are among the inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.usefixtures("fused_multiply_add"),
]
# experts, top_k, scoring, num_groups, top_groups, normalize, scale, round_to, has a bias
MODELS = {
    "qwen3": (128, 8, "softmax", 1, 1, True, 1.0, BF16, False),
    "mixtral": (8, 2, "softmax", 1, 1, True, 1.0, torch.float32, False),
    "deepseek-v2": (60, 6, "softmax", 5, 3, False, 16.0, torch.float32, False),
    "moonlight": (64, 6, "sigmoid", 1, 1, True, 2.446, torch.float32, True),
    "deepseek-v3": (48, 4, "sigmoid", 8, 4, True, 2.5, torch.float32, True),
    "odd": (37, 3, "sigmoid", 1, 1, False, 1.0, torch.float16, True),
}


def settings(name: str) -> tuple[int, Tensor | None, tuple[Any, ...]]:
    """Experts, correction bias, and the arguments behind digest."""
    experts, *choice, has_bias = MODELS[name]
    bias = randn(experts, seed=3, scale=0.1) if has_bias else None
    return experts, bias, (*choice, 5)


def logits_with_ties(tokens: int, experts: int) -> Tensor:
    """Rounded so that ties are common, with rows of one value, zeros of both signs, and large magnitudes."""
    logits = (randn(tokens, experts, seed=1, scale=2.0) * 2).round() / 2
    logits[1] = 0.25
    logits[2, ::2] = -0.0
    logits[3] *= 60.0
    logits[4, :3] = float("nan")
    logits[5, 1] = float("-inf")
    return logits


def on_cpu(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cpu() for tensor in tensors]


@pytest.mark.parametrize("name", MODELS)
def test_routes_are_those_of_the_twin(name):
    experts, bias, choice = settings(name)
    logits = logits_with_ties(23, experts)
    digest, expected_digest = torch.full((23,), 7, device=DEVICE), torch.full((23,), 7)
    with poisoned_outputs():
        found = router.forward(logits, bias, digest, *choice)
    expected = router_twin.forward(*on_cpu((logits, bias)), expected_digest, *choice)
    assert torch.equal(found[0].cpu(), expected[0])
    assert bool((found[0].diff(dim=1) > 0).all())
    assert torch.equal(found[1].cpu().nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    assert torch.equal(digest.cpu(), expected_digest)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_router_is_that_of_the_twin(name):
    experts, _, (top_k, scoring, _, _, normalize, scale, *_) = settings(name)
    logits, dweights = randn(9, experts, seed=4), randn(9, top_k, seed=5)
    chosen = torch.stack([torch.randperm(experts)[:top_k].sort().values for _ in range(9)]).int().to(DEVICE)
    found = router.backward(dweights, logits, chosen, top_k, scoring, normalize, scale)
    expected = router_twin.backward(*on_cpu((dweights, logits, chosen)), top_k, scoring, normalize, scale)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 3, 8, 23])
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek-v3", "odd"])
@pytest.mark.parametrize("padded", ["none of them", "some", "all"])
def test_routing_and_grouping_at_once_change_nothing(name, tokens, padded, monkeypatch):
    if padded == "some":  # many tokens, whose chunks are scanned
        monkeypatch.setattr(router, "MANY_TOKENS", 20)
        monkeypatch.setattr(groups, "FEW_CHUNKS", 1)
    experts, bias, choice = settings(name)
    logits = logits_with_ties(23, experts)[:tokens].contiguous()
    digests = torch.zeros(2, tokens, dtype=torch.int64, device=DEVICE)
    padding = torch.arange(tokens, device=DEVICE) % 3 == 1 if padded == "some" else None
    if padded == "all":
        padding = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    with poisoned_outputs():
        found = router.grouped_forward(logits, bias, digests[0], padding, *choice)
        routes = router.forward(logits, bias, digests[1], *choice)
    chosen = routes[0] if padding is None else routes[0].masked_fill(padding[:, None], -1)
    for one, other in zip(found, (*routes, *groups.forward(chosen, experts)), strict=True):
        assert same_bits(one, other)
    assert torch.equal(digests[0], digests[1])
    expected = router_twin.grouped_forward(*on_cpu((logits, bias)), None, *on_cpu((padding,)), *choice)
    for one, other in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        assert torch.equal(one.cpu(), other)


def pairs(kind: str, tokens: int, top_k: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    chosen = torch.randint(0, experts, (tokens, top_k), generator=generator)
    if kind == "skewed":
        chosen = torch.where(torch.rand(tokens, top_k, generator=generator) < 0.8, 2, chosen)
    if kind == "padded":
        chosen = torch.where(torch.rand(tokens, top_k, generator=generator) < 0.3, -1, chosen)
    if kind == "none":
        chosen = torch.full_like(chosen, -1)
    return chosen.int().to(DEVICE)


@pytest.mark.parametrize("kind", ["uniform", "skewed", "padded", "none"])
@pytest.mark.parametrize("few", [True, False])
def test_groups_are_those_of_the_twin(kind, few, monkeypatch):
    if not few:
        monkeypatch.setattr(groups, "FEW_CHUNKS", 1)
        monkeypatch.setattr(groups, "CHUNK", 64)
        monkeypatch.setattr(groups, "SCAN_CHUNKS", 4)
    for tokens, top_k, experts in ((1, 2, 3), (129, 3, 37), (110, 8, 128)):
        chosen = pairs(kind, tokens, top_k, experts)
        with poisoned_outputs():
            found = groups.forward(chosen, experts)
        for one, other in zip(found, groups_twin.forward(chosen.cpu(), experts), strict=True):
            assert torch.equal(one.cpu(), other)


def test_groups_of_no_tokens():
    rows, slots, offsets = groups.forward(torch.empty(0, 2, dtype=torch.int32, device=DEVICE), 5)
    assert rows.shape == (0,)
    assert slots.shape == (0, 2)
    assert offsets.tolist() == [0] * 6


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("width", [72, 1100])
def test_combine_is_that_of_the_twin(dtype, width):
    chosen = pairs("padded", 7, 3, 5)
    _, slots, _ = groups.forward(chosen, 5)
    y, shared, dout = (randn(n, width, seed=n, dtype=dtype) for n in (21, 7, 8))
    weights = randn(7, 3, seed=6)
    y[int((chosen >= 0).sum()) :] = float("nan")  # rows that belong to nobody
    with poisoned_outputs():
        plain, with_shared = combine.forward(y, weights, slots, None), combine.forward(y, weights, slots, shared)
        total, (dy, dweights) = combine.total(y, slots), combine.backward(dout[:7], y, weights, slots)
    y_, weights_, slots_, shared_, dout_ = on_cpu((y, weights, slots, shared, dout[:7]))
    assert same_bits(plain.cpu(), combine_twin.forward(y_, weights_, slots_, None))
    assert same_bits(with_shared.cpu(), combine_twin.forward(y_, weights_, slots_, shared_))
    assert same_bits(total.cpu(), combine_twin.total(y_, slots_))
    expected_dy, expected_dweights = combine_twin.backward(dout_, y_, weights_, slots_)
    taken = slots_[slots_ >= 0].long()
    assert same_bits(dy.cpu()[taken], expected_dy[taken])
    assert torch.allclose(dweights.cpu(), expected_dweights, rtol=1e-5, atol=1e-5)
    assert bool((dweights[slots < 0] == 0).all())


def test_a_token_combines_alone_as_in_company():
    chosen = pairs("uniform", 40, 4, 6)
    rows, slots, _ = groups.forward(chosen, 6)
    by_pair, weights = randn(160, 96, seed=1, dtype=BF16), randn(40, 4, seed=2)
    together = combine.forward(by_pair[rows.long()], weights, slots, None)
    for token in (0, 17, 39):
        rows, slots, _ = groups.forward(chosen[token : token + 1], 6)
        mine = by_pair[4 * token : 4 * token + 4][rows.long()]
        assert same_bits(combine.forward(mine, weights[token : token + 1], slots, None)[0], together[token])
