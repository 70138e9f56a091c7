"""Sums of squares: their definition, and that kernel and CPU twin give the same bits for any rows of any matrices."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from vexact.ops.cpu import square_sums as twin
from vexact.ops.kernels import square_sums as kernel
from vexact.ops.square_sums import LANES, STRETCH, num_stretches, square_sums, square_sums_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU, Triton's interpreter runs the kernel."""
SHAPES = [
    *((1, 1), (5000, 1), (300, 2), (33, 255), (5, 256), (2, 257), (9, 576)),
    *((6, STRETCH - 1), (17, STRETCH), (18, STRETCH + 1), (2, 3 * STRETCH), (1, 20_000), (0, 7), (3, 0)),
]


def matrices(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Values of every size: squares that overflow, squares that are subnormal, and zeros of both signs."""
    found = []
    for index, shape in enumerate(SHAPES):
        draw = torch.Generator().manual_seed(index)
        spread = 22 if dtype != torch.float16 else 4
        scale = 10.0 ** torch.empty(shape).uniform_(-spread, min(spread, 18), generator=draw)
        values = torch.randn(shape, generator=draw) * scale
        found.append(torch.where(values.abs() < 1e-20, 0 * values, values).to(dtype))
    found[2][7, 1] = found[3][0, 200] = 1e-20  # its square is no normal number; alone in its lane it is the sum
    found[2][7, 0] = 0
    found[8][3] = 1e20 if dtype != torch.float16 else 6e4
    found[8][4, 5] = float("nan")
    return found


def sums(module: object, given: list[Tensor]) -> Tensor:
    """All sums, one after another, with a guard before and behind them."""
    sizes = [len(m) * num_stretches(m.shape[1]) for m in given]
    out = torch.full((sum(sizes) + 2,), -7.0, device=given[0].device)
    module.square_sums(given, out, list(accumulate(sizes, initial=1))[:-1])
    assert out[0] == out[-1] == -7
    return out[1:-1].cpu()


def same_bits(left: Tensor, right: Tensor) -> bool:
    nan = left.isnan()
    return torch.equal(nan, right.isnan()) and torch.equal(left[~nan].view(torch.int32), right[~nan].view(torch.int32))


def test_a_sum_by_hand_and_every_element_once():
    out = torch.zeros(4)
    square_sums([torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[5.0]])], out, [0, 3])
    assert out.tolist() == [5, 25, 0, 25]
    for shape in SHAPES:
        given = torch.randint(-3, 4, shape).float()
        assert torch.equal(sums(twin, [given]), square_sums_reference(given).flatten())


def test_the_order_of_additions():
    row = torch.zeros(1, STRETCH + 2)
    row[0, 0] = 4096.0  # 2^24 when squared: a one that is added to it alone is lost
    row[0, [LANES, 2 * LANES]] = 1.0  # the same lane: both are lost, one after the other
    row[0, [1, 1 + LANES]] = 1.0  # another lane: together they are not
    row[0, STRETCH] = 3.0
    assert sums(twin, [row]).tolist() == [2.0**24 + 2, 9.0]


@pytest.mark.parametrize("dtype", kernel.TYPES)
def test_the_kernel_has_the_bits_of_its_twin(dtype):
    given = matrices(dtype)
    expected = sums(twin, given)
    assert expected.isnan().sum() == 1
    assert (expected.isinf().any() and (expected[expected < 1e-38] > 0).any()) == (dtype != torch.float16)
    assert same_bits(sums(kernel, [matrix.to(DEVICE) for matrix in given]), expected)


@pytest.mark.parametrize("module", [twin, kernel])
def test_a_row_has_the_same_bits_among_any_others_and_at_any_address(module, monkeypatch):
    matrix = torch.randn(37, STRETCH + 300, generator=torch.Generator().manual_seed(0))
    expected = sums(twin, [matrix]).view(37, 2)
    monkeypatch.setattr(twin, "BLOCK", 5000)
    moved = torch.empty(matrix.numel() + 3, device=DEVICE if module is kernel else "cpu")
    for offset, rows in ((0, slice(0, 37)), (1, slice(1, 2)), (3, slice(20, 37))):
        part = moved[offset : offset + matrix[rows].numel()].view(-1, matrix.shape[1]).copy_(matrix[rows])
        assert same_bits(sums(module, [part]), expected[rows].flatten())


def test_what_is_not_a_matrix_of_floats_is_refused():
    with pytest.raises(ValueError, match=r"matrix is torch.int64; use fp32, bf16 or fp16"):
        square_sums([torch.ones(2, 2, dtype=torch.int64)], torch.zeros(2), [0])
    with pytest.raises(ValueError, match=r"matrix is \(2,\), expected \(R, D\)"):
        square_sums([torch.ones(2)], torch.zeros(2), [0])
    with pytest.raises(ValueError, match="a matrix is on meta but out is on cpu"):
        square_sums([torch.ones(2, 2, device="meta")], torch.zeros(2), [0])


@pytest.mark.gpu
def test_large_matrices_have_the_same_bits_on_the_device_and_on_the_host():
    draw = torch.Generator().manual_seed(0)
    shapes = [(151_936, 257), (2048, 6144), (6144, 2048), (100_000, 1), (1, 10_000_001), (7000, 1030)]
    given = [torch.randn(shape, generator=draw) for shape in shapes]
    assert same_bits(sums(kernel, [matrix.cuda() for matrix in given]), sums(twin, given))
