"""Launches of a layer of experts: what is handed over again, and, on a GPU, the bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from releases import handed_over
from rowwise import randn, same_bits
from torch import Tensor

from vexact.ops.kernels import launches
from vexact.ops.kernels.moe import combine, grouped_linear, router

_SCRIPT = Path(__file__).with_name("moe_release.py")
_LAUNCHES = {"groups": {6: 2, 700: 2, 3000: 3}}  # ranks and places; counts of many chunks are added up between


def test_the_installed_triton_is_handed_what_its_own_launch_hands_over(tmp_path: Path) -> None:
    calls = handed_over(_SCRIPT, tmp_path)
    assert len(calls) == 3 * 14
    for call in calls:
        name, tokens = call["name"].removesuffix(" tokens").rsplit(", ", 1)
        expected = _LAUNCHES.get(name, {}).get(int(tokens), 1)
        assert (call["first"]["triton"], call["second"]["triton"]) == (expected, 0), call["name"]
        assert len(call["first"]["handed"]) == expected
        assert call["second"]["handed"] == call["first"]["handed"], call["name"]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 9, 300, 4100])
def test_repeated_launches_give_the_bits_of_first_ones(tokens: int) -> None:
    """A layer's forward and backward with other tokens, routes and weights of the same sizes."""
    experts, top_k, hidden, width = 16, 4, 256, 128

    def results(seed: int) -> list[Tensor]:
        x, dout = (randn(tokens, hidden, seed=seed + n, dtype=torch.bfloat16) for n in (0, 1))
        logits = randn(tokens, experts, seed=seed + 2)
        gate_up = randn(experts, 2 * width, hidden, seed=seed + 3, dtype=torch.bfloat16)
        down = randn(experts, hidden, width, seed=seed + 4, dtype=torch.bfloat16)
        settings = top_k, "softmax", 1, 1, True, 1.0, torch.bfloat16, 3
        chosen, weights, rows, slots, offsets = router.grouped_forward(logits, None, None, None, *settings)
        gathered = rows, offsets, top_k
        act, both = (each(x, gate_up, *gathered) for each in (grouped_linear.swiglu_forward, grouped_linear.forward))
        y = grouped_linear.forward(act, down, None, offsets, top_k)
        out = combine.forward(y, weights, slots, x)
        dy, dweights = combine.backward(dout, y, weights, slots)
        dact = grouped_linear.grad_input(dy, down, offsets)
        dx = combine.total(grouped_linear.grad_input(both, gate_up, offsets), slots)
        found = [chosen, weights, slots, offsets, act, both, y, out, dy, dweights, dact, dx]
        found.append(grouped_linear.grad_weight(both, x, *gathered))
        found.append(grouped_linear.grad_weight(dy, act, None, offsets, top_k))
        for fresh, counted in ((True, 2), (False, 2), (False, 1)):
            total = randn(experts // 2, hidden, width, seed=seed + 5)
            grouped_linear.add_grad_weight(total, dy, act, offsets, 2, counted, fresh)
            found.append(total)
        return [*found, router.backward(dweights, logits, chosen, top_k, "softmax", True, 1.0)]

    seeds = (0, 10, 20)
    launches.forget()
    repeated = [results(seed) for seed in seeds]
    for seed, given in zip(seeds, repeated, strict=True):
        launches.forget()
        for one, other in zip(given, results(seed), strict=True):
            assert same_bits(one, other)
