"""RMSNorm kernels against fp64, against their CPU twin, and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from rowwise import DEVICE, misaligned, poisoned_outputs, randn, relative_error, same_bits
from torch import Tensor

from vexact.ops.cpu import rms_norm as twin
from vexact.ops.kernels import rms_norm as kernel
from vexact.ops.rms_norm import rms_norm_reference

EPS = 1e-6
WIDTHS = [64, 73, 128, 576, 2048, 5120]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(rows, width, seed=width, dtype=dtype, scale=2.0), randn(width, seed=1, dtype=dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_matches_fp64(width: int, dtype: torch.dtype) -> None:
    x, weight = inputs(37, width, dtype)
    with poisoned_outputs():
        y, rstd = kernel.forward(x, weight, EPS)
    assert relative_error(y, rms_norm_reference(x, weight, EPS)) < TOLERANCE[dtype]
    assert relative_error(rstd, torch.rsqrt(x.double().square().mean(1) + EPS)) < 1e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_rounds_where_the_twin_does(dtype: torch.dtype) -> None:
    x, weight = inputs(9, 576, dtype)
    y, _ = kernel.forward(x, weight, EPS)
    expected, _ = twin.forward(x.cpu(), weight.cpu(), EPS)
    # Equal rounding points leave only rows whose rstd differs in its last bit: far below one unit of the output dtype.
    assert relative_error(y.cpu(), expected) < 0.1 * TOLERANCE[dtype]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_fused_residual_gives_the_bits_of_the_two_ops(width: int, dtype: torch.dtype) -> None:
    x, weight = inputs(21, width, dtype)
    residual = randn(21, width, seed=5, dtype=dtype)
    with poisoned_outputs():
        y, total, rstd = kernel.add_forward(x, residual, weight, EPS)
    assert same_bits(total, x + residual)
    expected, expected_rstd = kernel.forward(total, weight, EPS)
    assert same_bits(y, expected)
    assert same_bits(rstd, expected_rstd)


@pytest.mark.parametrize("width", [73, 128, 2048])
def test_a_row_does_not_depend_on_its_batch(width: int) -> None:
    x, weight = inputs(19, width, torch.bfloat16)
    dy = randn(19, width, seed=3, dtype=torch.bfloat16)
    y, rstd = kernel.forward(x, weight, EPS)
    dx, _ = kernel.backward(dy, x, weight, rstd)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 12), slice(18, 19)):
        part, part_rstd = kernel.forward(x[rows].contiguous(), weight, EPS)
        part_dx, _ = kernel.backward(dy[rows].contiguous(), x[rows].contiguous(), weight, part_rstd)
        assert same_bits(part, y[rows])
        assert same_bits(part_dx, dx[rows])


def test_heads_and_rows_of_one_length_share_their_bits() -> None:
    heads, weight = inputs(4 * 6, 128, torch.bfloat16)
    per_head, _ = kernel.forward(heads.view(4, 6, 128)[:, 2].contiguous(), weight, EPS)
    rows, _ = kernel.forward(heads, weight, EPS)
    assert same_bits(per_head, rows.view(4, 6, 128)[:, 2])


def test_alignment_does_not_change_bits() -> None:
    x, weight = inputs(5, 128, torch.bfloat16)
    y, rstd = kernel.forward(x, weight, EPS)
    assert same_bits(kernel.forward(misaligned(x), misaligned(weight), EPS)[0], y)
    dy = randn(5, 128, seed=2, dtype=torch.bfloat16)
    for plain, moved in zip(
        kernel.backward(dy, x, weight, rstd), kernel.backward(misaligned(dy), misaligned(x), misaligned(weight), rstd)
    ):
        assert same_bits(plain, moved)


@pytest.mark.parametrize("width", [64, 73, 576])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_backward_matches_fp64(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = kernel.backward_config(width)["BLOCK_M"]
    monkeypatch.setattr(kernel, "row_block", lambda num_rows, width: 3 * tile)  # several tiles, the last one ragged
    x, weight = inputs(101, width, dtype)
    dy = randn(101, width, seed=4, dtype=dtype)
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    rms_norm_reference(wide_x, wide_weight, EPS).backward(dy.double())
    _, rstd = kernel.forward(x, weight, EPS)
    with poisoned_outputs():
        dx, dweight = kernel.backward(dy, x, weight, rstd)
    assert dx.dtype == dweight.dtype == dtype
    assert relative_error(dx, wide_x.grad) < TOLERANCE[dtype]
    assert relative_error(dweight, wide_weight.grad) < TOLERANCE[dtype]


def test_row_blocks_are_whole_tiles_and_few() -> None:
    for width, programs in ((128, 512), (2048, 256), (5120, 256)):
        tile = kernel.backward_config(width)["BLOCK_M"]
        assert (
            kernel.row_block(0, width) == kernel.row_block(1, width) == kernel.row_block(tile * programs, width) == tile
        )
        assert kernel.row_block(tile * programs + 1, width) == 2 * tile
        assert kernel.row_block(10**6, width) % tile == 0


def test_no_rows_give_no_rows_and_a_zero_gradient() -> None:
    x, weight = inputs(0, 64, torch.float32)
    y, rstd = kernel.forward(x, weight, EPS)
    dx, dweight = kernel.backward(x, x, weight, rstd)
    assert y.shape == dx.shape == (0, 64)
    assert same_bits(dweight, torch.zeros(64, device=DEVICE))
