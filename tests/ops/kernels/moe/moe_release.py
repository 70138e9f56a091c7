"""Launches the kernels of experts through the installed Triton's own launchers; see `launches_release.py`.

A script: `python moe_release.py`, with the folder above this one on PYTHONPATH.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from launches_release import compare, install
from torch import Tensor

from vexact.ops.kernels.moe import combine, grouped_linear, groups, router
from vexact.ops.kernels.moe.tiles import product_tile

EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 128, 64
BF16 = torch.bfloat16


def zeros(*size: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(*size, dtype=dtype)


class Layer:
    """Inputs of one layer's launches, for so many tokens."""

    def __init__(self, tokens: int) -> None:
        pairs = tokens * TOP_K
        self.x, self.dout = zeros(tokens, HIDDEN), zeros(tokens, HIDDEN)
        self.gate_up, self.down = zeros(EXPERTS, 2 * WIDTH, HIDDEN), zeros(EXPERTS, HIDDEN, WIDTH)
        self.act, self.both, self.y = zeros(pairs, WIDTH), zeros(pairs, 2 * WIDTH), zeros(pairs, HIDDEN)
        self.odd, self.odd_down = zeros(pairs, WIDTH + 1)[:, :WIDTH], zeros(EXPERTS, HIDDEN, WIDTH + 1)[..., :WIDTH]
        self.rows, self.offsets = zeros(pairs, dtype=torch.int32), zeros(EXPERTS + 1, dtype=torch.int32)
        self.experts = zeros(tokens, TOP_K, dtype=torch.int32)
        self.slots, self.weights = torch.zeros_like(self.experts), zeros(tokens, TOP_K, dtype=torch.float32)
        self.total = zeros(2, HIDDEN, WIDTH, dtype=torch.float32)
        self.logits = zeros(tokens, EXPERTS, dtype=torch.float32)

    def calls(self) -> dict[str, Callable[[], object]]:
        gathered, settings = (self.rows, self.offsets, TOP_K), (TOP_K, "softmax", True, 1.0)
        return {
            "gate and up, SwiGLU": partial(grouped_linear.swiglu_forward, self.x, self.gate_up, *gathered),
            "gate and up": partial(grouped_linear.forward, self.x, self.gate_up, *gathered),
            "down": partial(grouped_linear.forward, self.act, self.down, None, self.offsets, 1),
            "odd rows": partial(grouped_linear.forward, self.odd, self.odd_down, None, self.offsets, 1),
            "gradient of tokens": partial(grouped_linear.grad_input, self.both, self.gate_up, self.offsets),
            "gradient of gate and up": partial(grouped_linear.grad_weight, self.both, self.x, *gathered),
            "gradient of down": partial(grouped_linear.grad_weight, self.y, self.act, None, self.offsets, 1),
            "gradient of down, by rank": partial(
                grouped_linear.grad_weight, self.y, self.act, None, self.offsets, 1, EXPERTS // 2
            ),
            "sum of gradients of down": partial(
                grouped_linear.add_grad_weight, self.total, self.y, self.act, self.offsets, EXPERTS // 2, 1, False
            ),
            "combine": partial(combine.forward, self.y, self.weights, self.slots, self.dout),
            "total": partial(combine.total, self.y, self.slots),
            "gradient of combine": partial(combine.backward, self.dout, self.y, self.weights, self.slots),
            "groups": partial(groups.forward, self.experts, EXPERTS),
            "gradient of routes": partial(router.backward, self.weights, self.logits, self.experts, *settings),
        }


class OwnMemory:
    """What a call allocates lies at the same places in its repetition."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._name, self._number = "", 0
        for where, name in ((Tensor, "new_empty"), (torch, "empty"), (torch, "empty_like")):
            setattr(where, name, partial(self._again, getattr(where, name)) if where is torch else self._method(name))

    def begin(self, name: str) -> None:
        self._name, self._number = name, 0

    def _method(self, name: str) -> Callable[..., Tensor]:
        allocate = getattr(Tensor, name)
        return lambda *args, **named: self._again(allocate, *args, **named)

    def _again(self, allocate: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        place, self._number = (self._name, self._number), self._number + 1
        if place not in self._kept:
            self._kept[place] = allocate(*args, **named)
        return self._kept[place]


def main() -> None:
    install()
    memory = OwnMemory()
    tiles = set()
    for tokens in (6, 700, 3000):
        for gated in (False, True):
            tiles.add(product_tile(tokens * TOP_K, EXPERTS, BF16, True, True, gated))
        for name, call in Layer(tokens).calls().items():
            title = f"{name}, {tokens} tokens"

            def repeated(title: str = title, call: Callable[[], object] = call) -> None:
                memory.begin(title)
                call()

            compare(title, repeated)
    assert len({tile.block_m < 128 for tile in tiles}) == 2, "tiles of few rows, and those that end in halves"


if __name__ == "__main__":
    main()
