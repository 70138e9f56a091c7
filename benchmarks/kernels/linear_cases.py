"""Shapes and inputs shared by the linear benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from vexact.ops.kernels.linear import matmul
from vexact.ops.kernels.linear.tiles import Layout, Tile

# name: weight (N, K). The attention and MLP projections are fused, as the models have them.
LAYER_SHAPES: dict[str, tuple[int, int]] = {
    "1.7B qkv": (4096, 2048),
    "1.7B o": (2048, 2048),
    "1.7B gate_up": (12288, 2048),
    "1.7B down": (2048, 6144),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "1.7B lm_head": (151936, 2048),
    "8B lm_head": (151936, 4096),
}
COLD_BYTES = 160 << 20  # more than three times the second-level cache: weights come from memory, as in a real model


@dataclass(slots=True)
class Problem:
    """One product C = A Bᵀ and where it is written."""

    layout: Layout
    a: Tensor
    b: Tensor
    out: Tensor

    def run(self, tile: Tile | None = None) -> Tensor:
        return matmul(self.a, self.b, self.out, layout=self.layout, tile=tile)


def make_problem(layout: Layout, rows: int, n: int, k: int, device: str = "cuda") -> Problem:
    """``rows`` tokens through a weight (n, k): the forward, or one of its gradients."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    if layout == "forward":
        return Problem(layout, draw(rows, k), draw(n, k), draw(rows, n))
    if layout == "grad_input":
        return Problem(layout, draw(rows, n), draw(n, k).t(), draw(rows, k))
    return Problem(layout, draw(rows, n).t(), draw(rows, k).t(), draw(n, k))


def rotation(problem: Problem) -> list[Problem]:
    """Copies of ``problem`` that together do not fit the cache, so that each call finds its weight cold."""
    size = sum(tensor.numel() * 2 for tensor in (problem.a, problem.b, problem.out))
    copies = [problem]
    for _ in range(max(1, min(32, ceil(COLD_BYTES / size))) - 1):
        copies.append(Problem(problem.layout, problem.a.clone(), problem.b.clone(), torch.empty_like(problem.out)))
    return copies


def stock_call(problem: Problem) -> Callable[[], Tensor]:
    """The same product by the vendor's library."""
    return lambda: torch.mm(problem.a, problem.b.t(), out=problem.out)
