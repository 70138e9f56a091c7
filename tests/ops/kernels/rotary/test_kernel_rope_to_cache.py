"""Rotation and cache write in one launch: the bits of the operators apart, in any layout, for any batch."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, misaligned, poisoned_outputs, randn, same_bits
from torch import Tensor

from vexact.ops import HeadNorms
from vexact.ops import rope_to_cache as rope_to_cache_op
from vexact.ops.cpu.rotary import rope_to_cache as twin
from vexact.ops.kernels.attention import write_kv
from vexact.ops.kernels.rotary import qk_norm_rope, rope
from vexact.ops.kernels.rotary import rope_to_cache as kernel

EPS = 1e-6
SLOTS = (17, 3, -1, 0, 31, 16, -1, 8, 25, 9, 1)
SHAPES = [((16, 8), 128, 128), ((9, 3), 64, 64), ((3, 1), 40, 24), ((2, 2), 96, 128)]


def arguments(
    heads: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(q, k, v), the weights of both norms, and (positions, table)."""
    q, k = (randn(len(SLOTS), count, head_dim, seed=count, dtype=dtype, scale=3.0) for count in heads)
    v = randn(len(SLOTS), heads[1], value_dim, seed=9, dtype=dtype)
    weights = [randn(head_dim, seed=seed, dtype=dtype) for seed in (3, 4)]
    positions = (torch.arange(len(SLOTS)) * 37 % 100).to(DEVICE)
    return [q, k, v], weights, [positions, randn(100, head_dim, seed=5)]


def pages_of(k: Tensor, v: Tensor) -> list[Tensor]:
    """Four pages of eight tokens, of other contents in every element."""
    return [
        torch.full((4, 8, *rows.shape[1:]), -7.0, dtype=rows.dtype, device=DEVICE).cumsum(0).to(rows.dtype)
        for rows in (k, v)
    ]


def apart(
    qkv: list[Tensor], weights: list[Tensor], angles: list[Tensor], pages: list[Tensor], slots: Tensor
) -> list[Tensor]:
    q, k, v = qkv
    if weights:
        q, k = qk_norm_rope.forward(q, k, *weights, EPS, *angles)[:2]
    else:
        q, k = rope.forward(q, k, *angles, False)
    write_kv(k, v, *pages, slots)
    return [q, *pages]


def at_once(
    qkv: list[Tensor], weights: list[Tensor], angles: list[Tensor], pages: list[Tensor], slots: Tensor
) -> list[Tensor]:
    with poisoned_outputs():
        q = kernel.forward(*qkv, *(weights or (None, None)), EPS, *angles, *pages, slots)
    return [q, *pages]


@pytest.mark.parametrize(("heads", "head_dim", "value_dim"), SHAPES)
@pytest.mark.parametrize("normed", [True, False])
def test_bits_of_the_operators_apart(heads: tuple[int, int], head_dim: int, value_dim: int, normed: bool) -> None:
    qkv, weights, angles = arguments(heads, head_dim, value_dim)
    weights, slots = weights if normed else [], torch.tensor(SLOTS, device=DEVICE)
    expected = apart(qkv, weights, angles, pages_of(*qkv[1:]), slots)
    for one, other in zip(at_once(qkv, weights, angles, pages_of(*qkv[1:]), slots), expected, strict=True):
        assert same_bits(one, other)
    fused = torch.cat([part.flatten(1) for part in qkv], dim=1)
    views = [
        part.unflatten(1, like.shape[1:])
        for part, like in zip(fused.split([like[0].numel() for like in qkv], dim=1), qkv, strict=True)
    ]
    shifted = [misaligned(part) for part in qkv]
    for given in (views, shifted):
        for one, other in zip(at_once(given, weights, angles, pages_of(*qkv[1:]), slots), expected, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("normed", [True, False])
def test_a_token_has_the_same_bits_alone(normed: bool) -> None:
    qkv, weights, angles = arguments((4, 2), 64, 64)
    weights, slots = weights if normed else [], torch.tensor(SLOTS, device=DEVICE)
    together = at_once(qkv, weights, angles, pages_of(*qkv[1:]), slots)
    pages = pages_of(*qkv[1:])
    for token in range(len(SLOTS)):
        rows = slice(token, token + 1)
        one = at_once([x[rows] for x in qkv], weights, [angles[0][rows], angles[1]], pages, slots[rows])
        assert same_bits(one[0], together[0][rows])
    assert all(same_bits(one, other) for one, other in zip(pages, together[1:], strict=True))


@pytest.mark.parametrize("normed", [True, False])
def test_the_twin_has_the_bits_of_its_parts_and_the_operator_those_of_the_twin(normed: bool) -> None:
    qkv, weights, angles = ([x.cpu() for x in part] for part in arguments((4, 2), 32, 32, torch.float32))
    slots, given = torch.tensor(SLOTS), weights if normed else [None, None]
    pages, others = ([x.cpu() for x in pages_of(*qkv[1:])] for _ in range(2))
    expected = twin.forward(*qkv, *given, EPS, *angles, *pages, slots)
    norms = HeadNorms(*weights, EPS) if normed else None
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = rope_to_cache_op(*qkv, norms, *angles, (others[0], others[1]), slots)
        for one, other in zip((out, *others), (expected, *pages), strict=True):
            assert same_bits(one, other)
    assert (pages[0].flatten(0, 1)[17] == others[0].flatten(0, 1)[17]).all()


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    (q, k, v), weights, (positions, table) = ([x.cpu() for x in part] for part in arguments((4, 2), 32, 32))
    pages, slots = [x.cpu() for x in pages_of(k, v)], torch.tensor(SLOTS)

    def refused(match: str, *, norms: HeadNorms | None = None, cache: object = None, slots: Tensor = slots) -> None:
        with pytest.raises(ValueError, match=match):
            rope_to_cache_op(q, k, v, norms, positions, table, cache or tuple(pages), slots)

    refused("q_weight is .*expected", norms=HeadNorms(weights[0][:3], weights[1], EPS))
    refused("the cache torch.float32", cache=(pages[0].float(), pages[1]))
    refused("values are .*the cache", cache=(pages[0], pages[1][..., :16].contiguous()))
    refused("slot_mapping is", slots=slots[1:])
    refused("slot_mapping is", slots=slots.int())
