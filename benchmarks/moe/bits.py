"""Every row of the grouped products against ``linear`` and ``swiglu`` of that row with its expert's matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.moe.cases import DEVICE, MoeShape, draw_groups, make_weights
from vexact.ops.kernels import linear, swiglu
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe import grouped_linear, tiles

ROUTINGS = ("uniform", "skewed", "one", "few")
SIZES = (1, 8, 37, 256, 1000, 4096, 16384)
BF16 = torch.bfloat16


def bit_cases(quick: bool) -> list[tuple[str, int]]:
    """(routing, tokens)."""
    return [
        (kind, tokens) for kind in (ROUTINGS[:2] if quick else ROUTINGS) for tokens in SIZES[: 5 if quick else None]
    ]


def count_rows(shape: MoeShape, kind: str, tokens: int) -> tuple[int, int]:
    """Rows compared and rows that differ, over tiles, of three products and both gradients."""
    # Half the width: a row's sum has the length that it has in the model where that is the hidden size.
    small = replace(shape, width=shape.width // 2)
    weights, compared, different = make_weights(small), 0, 0
    for found, expected in _cases(small, weights.gate_up, weights.down, kind, tokens):
        compared += expected.shape[0]
        different += int((found != expected).any(1).sum())
    del weights, found, expected
    torch.cuda.empty_cache()  # other processes use this GPU, too
    return compared, different


def _cases(shape: MoeShape, gate_up: Tensor, down: Tensor, kind: str, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows, _, offsets = draw_groups(shape, tokens, kind, seed=tokens)
    x = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=BF16)
    gathered, ends = x[rows.long() // shape.top_k], offsets.tolist()
    owned = [(e, slice(a, b)) for e, (a, b) in enumerate(pairwise(ends)) if b > a]

    def each(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([linear.forward(x[places], weight[e], None, BF16) for e, places in owned])

    expected = each(gathered, gate_up)
    act = swiglu.forward(expected)
    expected_down = each(act, down)
    dx = torch.cat([linear.grad_input(expected[places], gate_up[e]) for e, places in owned])
    few = 4 if tokens >= 4096 else 10
    top_k = shape.top_k
    for tile in sample(tiles.GATHERED, few):
        yield grouped_linear.product(x, gate_up, rows, offsets, top_k, tile=tile), expected
    for tile in sample(tiles.FORWARD, few):
        yield grouped_linear.product(act, down, None, offsets, top_k, tile=tile), expected_down
    for tile in sample(tiles.GATED, few):
        yield grouped_linear.product(x, gate_up, rows, offsets, top_k, gated=True, tile=tile), act
        yield grouped_linear.product(expected, gate_up.transpose(1, 2), None, offsets, 1, tile=tile), dx
    if tokens <= 4096:
        hit = torch.tensor([e for e, _ in owned], device=DEVICE)
        dweight = torch.stack([linear.grad_weight(expected[places], gathered[places]) for _, places in owned])
        for tile in (tiles.GRAD_WEIGHT, tiles.POINTER_GRAD_WEIGHT, Tile("tma", 64, 128, 32, 4, 4)):
            found = grouped_linear.grad_weight(expected, x, rows, offsets, top_k, tile=tile)
            yield found[hit].flatten(0, 1), dweight.flatten(0, 1)
        # as if every second expert were the one before it, with places of another rank
        found = grouped_linear.grad_weight(expected, gathered, None, offsets, 1, 2)
        yield found.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)[hit].flatten(0, 1), dweight.flatten(0, 1)


def sample(entries: tiles.Entries, count: int) -> list[Tile]:
    """Tiles of a table and of the pointer kernel: the last ones, which are the large ones, when ``count`` is small."""
    table = list(dict.fromkeys(tile for _, tile in (*tiles.POINTER, *entries)))
    return table[-count:]
