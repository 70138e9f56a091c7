"""Sums of squares along the rows of many matrices at once, in one order of additions on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vexact.ops.checks import check_dims, check_floats
from vexact.ops.dispatch import module

STRETCH = 2048  # decides bits, as LANES does
LANES = 256


def num_stretches(width: int) -> int:
    """Sums that a row of ``width`` columns has.

    >>> num_stretches(2049)
    2
    """
    return -(-width // STRETCH)


def square_sums(matrices: Sequence[Tensor], out: Tensor, offsets: Sequence[int]) -> None:
    """Writes the sum of the squares of every ``STRETCH`` columns of every row, without waiting for the device.

    fp32 throughout. Column c of a stretch belongs to lane c mod ``LANES``; a lane adds its squares in order, and lanes
    are added pairwise, the upper half to the lower one until one is left. So the bits of a sum depend on its own
    columns alone, and on no device.

    Args:
        matrices: (R, D) each, of any sizes, on one device.
        out: (N,) fp32; row r of a matrix has its S = ``num_stretches(D)`` sums from ``offset + r S`` on.
        offsets: one per matrix.

    Raises:
        ValueError: a matrix is not (R, D) or neither fp32, bf16 nor fp16, or it is on another device than ``out``.
    """
    for matrix in matrices:
        check_floats("square_sums", matrix=matrix)
        check_dims("square_sums", 2, "(R, D)", matrix=matrix)
        if matrix.device != out.device:
            raise ValueError(f"square_sums: a matrix is on {matrix.device} but out is on {out.device}")
    module("square_sums", out).square_sums([matrix.detach().contiguous() for matrix in matrices], out, offsets)


def square_sums_reference(matrix: Tensor) -> Tensor:
    """(R, D) -> (R, S) in the dtype of ``matrix``, in plain torch."""
    rows, width = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, num_stretches(width) * STRETCH - width))
    return padded.square().view(rows, num_stretches(width), STRETCH).sum(2)
