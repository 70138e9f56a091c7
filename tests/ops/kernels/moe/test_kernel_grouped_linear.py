"""Grouped products: an expert's rows have the bits of ``linear`` with its matrix, whatever the tile and the routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_support import DEVICE, integers, randn, tensor_core  # noqa: F401
from rowwise import poisoned_outputs, same_bits
from torch import Tensor

from vexact.ops.cpu.moe import grouped_linear as twin
from vexact.ops.kernels import linear, swiglu
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe import grouped_linear, groups, tiles

BF16 = torch.bfloat16
EXPERTS, TOP_K = 6, 3
ROUTINGS = ("uniform", "skewed", "one expert", "padded")


def group(kind: str, tokens: int) -> tuple[Tensor, Tensor]:
    """rows (P,), offsets (E+1,) of ``tokens`` tokens; expert 2 is never chosen."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.tensor([0, 1, 3, 4, 5])[torch.randint(0, 5, (tokens, TOP_K), generator=generator)]
    if kind == "skewed":
        chosen = torch.where(torch.rand(tokens, TOP_K, generator=generator) < 0.8, 4, chosen)
    if kind == "one expert":
        chosen = torch.full_like(chosen, 5)
    if kind == "padded":
        chosen = torch.where(torch.rand(tokens, TOP_K, generator=generator) < 0.4, -1, chosen)
    rows, _, offsets = groups.forward(chosen.int().to(DEVICE), EXPERTS)
    return rows, offsets


def by_expert(offsets: Tensor) -> list[tuple[int, slice]]:
    ends = offsets.tolist()
    return [(e, slice(ends[e], ends[e + 1])) for e in range(len(ends) - 1) if ends[e + 1] > ends[e]]


def each(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor) -> list[tuple[slice, Tensor]]:
    """What ``linear`` gives the places of every expert."""
    gathered = x if rows is None else x[rows.long() // TOP_K]
    return [(p, linear.forward(gathered[p].contiguous(), weight[e], None, x.dtype)) for e, p in by_expert(offsets)]


def variants(entries: tiles.Entries) -> list[Tile]:
    """Tiles that differ in something the interpreter can see, and each of them persistent, with strips."""
    seen: dict[tuple, Tile] = {}
    for _, tile in entries:
        for waves in (0, 1) if tile.kernel == "tma" else (0,):
            splits = 2 if waves and tile.block_n >= 64 else tile.splits
            one = replace(tile, waves=waves, splits=splits)
            seen.setdefault((tile.kernel, tile.block_m, tile.block_n, tile.block_k, splits, tile.swap, waves), one)
    return list(seen.values())


@pytest.mark.parametrize("gated", [False, True])
def test_every_tile_gives_the_bits_of_linear(gated):
    x, weight = randn(30, 136, seed=1, dtype=BF16), randn(EXPERTS, 144, 136, seed=2, dtype=BF16)
    rows, offsets = group("skewed", 30)
    expected = each(x, weight, rows, offsets)
    if gated:
        expected = [(places, swiglu.forward(part)) for places, part in expected]
    for tile in variants((*(tiles.GATED if gated else tiles.FORWARD), *tiles.POINTER)):
        with poisoned_outputs():
            out = grouped_linear.product(x, weight, rows, offsets, TOP_K, gated=gated, tile=tile)
        assert out.is_contiguous()
        for places, part in expected:
            assert same_bits(out[places], part), tile


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_every_routing_gives_the_bits_of_linear(kind, tokens):
    x, weight = randn(tokens, 64, seed=1, dtype=BF16), randn(EXPERTS, 96, 64, seed=2, dtype=BF16)
    rows, offsets = group(kind, tokens)
    with poisoned_outputs():
        gathered = grouped_linear.forward(x, weight, rows, offsets, TOP_K)
        in_place = grouped_linear.forward(x[rows.long() // TOP_K], weight, None, offsets, TOP_K)
        activated = grouped_linear.swiglu_forward(x, weight, rows, offsets, TOP_K)
        dx = grouped_linear.grad_input(gathered.nan_to_num(0.0), weight, offsets)
    for places, part in each(x, weight, rows, offsets):
        assert same_bits(gathered[places], part)
        assert same_bits(in_place[places], part)
        assert same_bits(activated[places], swiglu.forward(part))
    for expert, places in by_expert(offsets):
        assert same_bits(dx[places], linear.grad_input(gathered[places].contiguous(), weight[expert]))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(96, 72), (50, 61), (72, 40)])
def test_values_at_ragged_sizes(dtype, n, k):
    tokens, (rows, offsets) = 40, group("padded", 40)
    x, weight = integers(tokens, k, seed=1, dtype=dtype), integers(EXPERTS, n, k, seed=2, dtype=dtype)
    dy = integers(rows.numel(), n, seed=3, dtype=dtype)
    end = int(offsets[-1])
    dy[end:] = float("nan")  # rows that belong to nobody
    at = rows.cpu(), offsets.cpu()
    with poisoned_outputs():
        out = grouped_linear.forward(x, weight, rows, offsets, TOP_K)
        dx = grouped_linear.grad_input(dy, weight, offsets)
        dweight = grouped_linear.grad_weight(dy, x, rows, offsets, TOP_K)
        dweight_in_place = grouped_linear.grad_weight(dy, x[rows.long() // TOP_K], None, offsets, TOP_K)
    expected = twin.forward(x.cpu(), weight.cpu(), *at, TOP_K)
    assert torch.equal(out.cpu()[:end], expected[:end])
    assert torch.equal(dx.cpu()[:end], twin.grad_input(dy.cpu(), weight.cpu(), at[1])[:end])
    expected = twin.grad_weight(dy.cpu(), x.cpu(), *at, TOP_K)
    assert torch.equal(dweight.cpu(), expected)
    assert torch.equal(dweight_in_place.cpu(), expected)
    assert bool((dweight[2] == 0).all())


@pytest.mark.parametrize("gather", [True, False])
def test_weight_gradients_have_the_bits_of_linear_for_every_tile(gather):
    x, dy = randn(40, 80, seed=1, dtype=BF16), randn(120, 72, seed=2, dtype=BF16)
    rows, offsets = group("skewed", 40)
    gathered = x[rows.long() // TOP_K]
    shapes = (
        tiles.GRAD_WEIGHT,
        tiles.POINTER_GRAD_WEIGHT,
        Tile("tma", 64, 32, 32, 4, 3),
        Tile("tma", 64, 64, 16, 4, 3),
    )
    for tile in shapes:
        given = (x, rows) if gather else (gathered, None)
        found = grouped_linear.grad_weight(dy, *given, offsets, TOP_K, tile=tile)
        for expert, places in by_expert(offsets):
            part = linear.grad_weight(dy[places].contiguous(), gathered[places].contiguous())
            assert same_bits(found[expert], part), tile


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_weight_gradients_of_several_ranks_lie_together_by_rank(ranks, dtype):
    x, dy = randn(120, 80, seed=1, dtype=dtype), randn(120, 72, seed=2, dtype=dtype)
    _, offsets = group("skewed", 40)
    with poisoned_outputs():
        found = grouped_linear.grad_weight(dy, x, None, offsets, 1, ranks)
        apart = grouped_linear.grad_weight(dy, x, None, offsets, 1)
    assert found.is_contiguous()
    for rank in range(ranks):
        for expert in range(EXPERTS // ranks):
            assert same_bits(found[rank * (EXPERTS // ranks) + expert], apart[expert * ranks + rank])
    expected = twin.grad_weight(dy.cpu(), x.cpu(), None, offsets.cpu(), 1, ranks)
    torch.testing.assert_close(found.cpu().float(), expected.float(), atol=0.2, rtol=0.02)
    assert twin.grad_weight(dy.cpu(), x.cpu(), None, offsets.cpu(), 1, ranks).is_contiguous()


SUM_TILES = {
    BF16: (
        tiles.GRAD_WEIGHT_SUM,
        tiles.POINTER_GRAD_WEIGHT,
        Tile("tma", 64, 32, 32, 4, 3),
        Tile("tma", 64, 64, 16, 4, 3),
    ),
    torch.float32: (tiles.FLOAT32_GRAD_WEIGHT,),
}


@pytest.mark.parametrize("dtype", SUM_TILES)
@pytest.mark.parametrize(("ranks", "counted"), [(2, 2), (3, 2), (6, 6), (6, 1)])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_sum_of_gradients_has_the_bits_of_adding_one_rank_after_another(dtype, ranks, counted, fresh):
    x, dy = randn(120, 80, seed=1, dtype=dtype), randn(120, 72, seed=2, dtype=dtype)
    _, offsets = group("skewed", 40)
    dy[:, 5], dy[:, 6] = 0.0, -0.0
    before = randn(EXPERTS // ranks, 72, 80, seed=3)
    before[:, 5:9] = -0.0
    pieces = grouped_linear.grad_weight(dy, x, None, offsets, 1, ranks).unflatten(0, (ranks, -1))
    expected = pieces[0].float() if fresh else before + pieces[0]
    for piece in pieces[1:counted]:
        expected += piece
    for tile in (None, *SUM_TILES[dtype]):
        total = torch.full_like(before, float("nan")) if fresh else before.clone()
        grouped_linear.add_grad_weight(total, dy, x, offsets, ranks, counted, fresh, tile=tile)
        assert same_bits(total, expected), tile
    of_twin = torch.full_like(before, float("nan")).cpu() if fresh else before.cpu()
    twin.add_grad_weight(of_twin, dy.cpu(), x.cpu(), offsets.cpu(), ranks, counted, fresh)
    torch.testing.assert_close(total.cpu(), of_twin, atol=0.4, rtol=0.02)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_sum_without_any_place_is_that_of_zeros(fresh):
    empty, offsets = torch.empty(0, 32, dtype=BF16, device=DEVICE), group("uniform", 0)[1]
    before = randn(EXPERTS // 2, 16, 32, seed=1)
    before[0] = -0.0
    total = torch.full_like(before, float("nan")) if fresh else before.clone()
    grouped_linear.add_grad_weight(total, empty[:, :16], empty, offsets, 2, 2, fresh)
    assert same_bits(total, torch.zeros_like(before) if fresh else before + 0.0)
    of_twin = total.cpu().fill_(float("nan")) if fresh else before.cpu()
    twin.add_grad_weight(of_twin, empty[:, :16].cpu(), empty.cpu(), offsets.cpu(), 2, 2, fresh)
    assert same_bits(total.cpu(), of_twin)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_expert_does_not_see_what_is_not_its_own():
    """Infinities and NaN in another expert's rows and matrix, in rows of nobody, and behind the last column."""
    x, weight = integers(20, 56, seed=1, dtype=BF16), integers(EXPERTS, 72, 56, seed=2, dtype=BF16)
    rows, offsets = group("padded", 20)
    dy = integers(60, 72, seed=3, dtype=BF16)
    clean = [grouped_linear.forward(x, weight, rows, offsets, TOP_K), grouped_linear.grad_input(dy, weight, offsets)]
    clean.append(grouped_linear.grad_weight(dy, x[rows.long() // TOP_K], None, offsets, TOP_K))
    weight[3] = float("inf")
    spoiled = slice(int(offsets[3]), int(offsets[4]))
    dy[spoiled], dy[int(offsets[-1]) :] = float("nan"), float("nan")
    found = [grouped_linear.forward(x, weight, rows, offsets, TOP_K), grouped_linear.grad_input(dy, weight, offsets)]
    found.append(grouped_linear.grad_weight(dy, x[rows.long() // TOP_K], None, offsets, TOP_K))
    for expert, places in by_expert(offsets):
        if expert != 3:
            assert same_bits(found[0][places], clean[0][places])
            assert same_bits(found[1][places], clean[1][places])
            assert same_bits(found[2][expert], clean[2][expert])


def test_no_tokens():
    empty, weight = torch.empty(0, 32, dtype=BF16, device=DEVICE), randn(EXPERTS, 16, 32, seed=1, dtype=BF16)
    rows, offsets = group("uniform", 0)
    assert grouped_linear.forward(empty, weight, rows, offsets, TOP_K).shape == (0, 16)
    assert grouped_linear.grad_input(empty[:, :16], weight, offsets).shape == (0, 32)
    for ranks in (1, 3):
        dweight = grouped_linear.grad_weight(empty[:, :16], empty, rows, offsets, TOP_K, ranks)
        assert dweight.shape == (EXPERTS, 16, 32)
        assert bool((dweight == 0).all())


def test_weights_of_any_stride():
    x, weight = integers(20, 48, seed=1, dtype=BF16), integers(EXPERTS, 40, 48, seed=2, dtype=BF16)
    rows, offsets = group("uniform", 20)
    expected = grouped_linear.forward(x, weight, rows, offsets, TOP_K)
    every_other = torch.full((EXPERTS, 80, 96), float("nan"), dtype=BF16, device=DEVICE)
    every_other[:, ::2, ::2] = weight
    for view in (weight.transpose(1, 2).contiguous().transpose(1, 2), every_other[:, ::2, ::2]):
        assert same_bits(grouped_linear.forward(x, view, rows, offsets, TOP_K), expected)
