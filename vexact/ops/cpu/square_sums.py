"""CPU twin of the sums of squares: every addition is one operation between elements, which rounds alike everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vexact.ops.square_sums import LANES, STRETCH, num_stretches

BLOCK = 1 << 16
"""Elements squared at a time: they stay in a processor's cache. No bit depends on it."""


def square_sums(matrices: Sequence[Tensor], out: Tensor, offsets: Sequence[int]) -> None:
    """Matrices (R, D) contiguous, out (N,) fp32; see ``ops.square_sums``."""
    for matrix, offset in zip(matrices, offsets, strict=True):
        rows, width = matrix.shape
        if not matrix.numel():
            continue
        count = num_stretches(width)
        sums = out[offset : offset + rows * count].view(rows, count)
        height = max(1, BLOCK // min(width, STRETCH))
        for block, part in zip(matrix.split(height), sums.split(height), strict=True):
            for stretch, values in enumerate(block.split(STRETCH, dim=1)):
                part[:, stretch] = _add_columns(values)


def _add_columns(values: Tensor) -> Tensor:
    """(R, at most STRETCH) -> (R,) fp32."""
    values = values.float()
    first, *others = (values * values).split(LANES, dim=1)
    for more in others:
        first[:, : more.shape[1]] += more
    lanes = first.shape[1]
    while lanes > 1:
        half = 1 << (lanes - 1).bit_length() - 1
        first[:, : lanes - half] += first[:, half:lanes]  # what is missing of the upper half would be zeros
        lanes = half
    return first[:, 0]
