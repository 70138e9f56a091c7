"""SwiGLU in the epilogue of the product of gate and up: the bits of the two kernels, for every tile and batch."""

from __future__ import annotations

import pytest
import torch
from linear_support import DEVICE, randn, tensor_core  # noqa: F401
from rowwise import misaligned, poisoned_outputs, relative_error, same_bits
from torch import Tensor

from vexact.ops import linear_swiglu as linear_swiglu_op
from vexact.ops.kernels import chain, linear, linear_swiglu, swiglu
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.linear_swiglu import linear_swiglu_reference

TILES = [
    *(tile for _, tile in linear_swiglu.TILES),
    Tile("tma", 16, 32, 128, 4, 3, swap=True),  # gate and up apart
    Tile("tma", 64, 16, 32, 4, 3, group_m=2),
    Tile("tma", 128, 64, 64, 8, 3),
]


def operands(rows: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return randn(rows, depth, seed=1, dtype=dtype), randn(2 * width, depth, seed=2, dtype=dtype)


def apart(x: Tensor, weight: Tensor) -> Tensor:
    return swiglu.forward(linear.forward(x, weight, None, x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 48, 64), (37, 72, 200), (130, 40, 96)])
def test_every_tile_has_the_bits_of_the_kernels_apart(dtype: torch.dtype, rows: int, width: int, depth: int) -> None:
    x, weight = operands(rows, width, depth, dtype)
    expected = apart(x, weight)
    assert relative_error(expected, linear_swiglu_reference(x, weight)) < 0.01
    assert linear_swiglu.fits(x, weight)
    for tile in TILES:
        with poisoned_outputs():
            out = linear_swiglu.product(x, weight, tile)
        assert same_bits(out, expected), tile


def test_a_row_has_the_same_bits_in_every_batch() -> None:
    x, weight = operands(70, 56, 128)
    whole = apart(x, weight)
    for first, rows in ((0, 1), (3, 16), (20, 33), (5, 65)):
        for tile in TILES[:3]:
            alone = linear_swiglu.product(x[first : first + rows], weight, tile)
            assert same_bits(alone, whole[first : first + rows])


def test_one_launch_where_it_is_on_and_the_operands_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, ...]] = []
    product = linear_swiglu.product
    monkeypatch.setattr(linear_swiglu, "product", lambda x, *rest: (taken.append(tuple(x.shape)), product(x, *rest))[1])
    x, weight = operands(300, 40, 64)
    cases = [
        (x[:8], weight),
        (x[:0], weight),  # no rows
        (x, weight),  # more than any tile is for
        (misaligned(x[:8]), weight),
        (x[:8].float(), weight.float()),
        (x[:8], weight.t().contiguous().t()),
        operands(8, 44, 64),  # half of the rows is no multiple of 16 bytes of output
    ]
    for steps, expected in ((Chain(), []), (Chain(fuse=True), [(8, 64)])):
        taken.clear()
        monkeypatch.setattr(chain, "STEPS", ((chain.LARGE, steps),))
        for one, other in cases:
            assert same_bits(linear_swiglu.forward(one, other), apart(one, other))
        assert taken == expected


def test_the_operator_refuses_what_does_not_fit() -> None:
    x, weight = (tensor.to(DEVICE) for tensor in operands(4, 24, 32))
    with torch.no_grad():
        assert linear_swiglu_op(x, weight).shape == (4, 24)
        for wrong, says in (
            ((x, weight[:-1]), "expected \\(2I, 32\\)"),
            ((x[:, :16], weight), "expected \\(2I, 16\\)"),
            ((x[None], weight), "x is \\(1, 4, 32\\)"),
            ((x.float(), weight), "cast one of them"),
        ):
            with pytest.raises(ValueError, match=says):
                linear_swiglu_op(*wrong)


def test_gradients_are_those_of_the_operators() -> None:
    from vexact.ops import linear as linear_op
    from vexact.ops import swiglu as swiglu_op

    x, weight = (tensor.requires_grad_() for tensor in operands(5, 24, 32))
    found = torch.autograd.grad(linear_swiglu_op(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(swiglu_op(linear_op(x, weight)).sum(), (x, weight))
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        assert same_bits(linear_swiglu_op(x, weight), swiglu_op(linear_op(x, weight)))
