"""Shapes, weights and routings of the mixture-of-experts benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.ops.kernels.moe import groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a rehearsal; nothing is measured there


@dataclass(frozen=True, slots=True)
class MoeShape:
    """One layer of a model."""

    name: str
    experts: int
    hidden: int
    width: int  # of one expert
    top_k: int
    scoring: str
    shared: int = 0  # width of the shared experts together

    def flops(self, tokens: int) -> int:
        """Of the two products of the routed and shared experts, forward."""
        return 6 * tokens * self.hidden * (self.top_k * self.width + self.shared)


QWEN3 = MoeShape("Qwen3-30B-A3B", 128, 2048, 768, 8, "softmax")
MOONLIGHT = MoeShape("Moonlight-16B-A3B", 64, 2048, 1408, 6, "sigmoid", 2 * 1408)
REHEARSAL = MoeShape("rehearsal", 8, 64, 32, 2, "softmax", 32)  # on a CPU


@dataclass(slots=True)
class Weights:
    """What a layer holds, bf16; the router's logits are drawn, not computed."""

    gate_up: Tensor
    down: Tensor


def make_weights(shape: MoeShape) -> Weights:
    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=torch.bfloat16) * size[-1] ** -0.5

    return Weights(draw(shape.experts, 2 * shape.width, shape.hidden), draw(shape.experts, shape.hidden, shape.width))


def draw_experts(shape: MoeShape, tokens: int, kind: str = "uniform", seed: int = 0) -> Tensor:
    """(T, k) int32, ascending and distinct: uniform, skewed (as 1 / rank), one (all tokens the same), or few (half of
    the experts never chosen)."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    odds = torch.ones(shape.experts, device=DEVICE)
    if kind == "skewed":
        odds = 1.0 / torch.arange(1, shape.experts + 1, device=DEVICE)
    if kind == "few":
        odds[::2] = 0.0
    if kind == "one":
        odds[shape.top_k :] = 0.0
    noise = torch.rand(tokens, shape.experts, device=DEVICE, generator=generator).log() / odds
    return noise.topk(shape.top_k, dim=1).indices.sort(1).values.int()


def draw_groups(shape: MoeShape, tokens: int, kind: str = "uniform", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """rows, slots and offsets of such experts."""
    return groups.forward(draw_experts(shape, tokens, kind, seed), shape.experts)
