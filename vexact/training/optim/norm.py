"""The 2-norm of all gradients in one fixed order of additions, on any device and over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vexact.training.parallel.ranks import Ranks, local

_BLOCK = {"cuda": 1 << 24}
_HOST_BLOCK = 1 << 16
"""Elements squared at a time: enough to fill the device, few enough to stay in a cache on the host. No bit changes."""


def total_norm(gradients: Sequence[Tensor], ranks: Ranks) -> float:
    """The norm of whole gradients of which every rank holds some rows; NaN or infinite if a gradient or square is.

    Squares are added pairwise, first within a row in fp32, then over the rows of all gradients in fp64. A sharded
    gradient has whole rows on a rank, so that the order knows nothing of the ranks, and every addition is one
    operation between elements, so that it knows nothing of the device. Waits for the device once.
    """
    if not gradients:
        return 0.0
    sizes = [-(-gradient.shape[0] // ranks.world_size) for gradient in gradients]  # rows per rank, the last has fewer
    sums = torch.zeros(sum(sizes), dtype=torch.float32, device=gradients[0].device)
    for gradient, part in zip(gradients, sums.split(sizes), strict=True):
        rows = local(gradient)
        if rows.numel():
            _square_rows(rows, part[: len(rows)])
    by_gradient = ranks.gather(sums).split(sizes, dim=1)
    rows = torch.cat([part.flatten()[: len(g)] for part, g in zip(by_gradient, gradients, strict=True)])
    return math.sqrt(_pairwise(rows.double().unsqueeze(0)).item())


def _square_rows(rows: Tensor, sums: Tensor) -> None:
    """Sums of squares of (R, ...) into (R,) fp32."""
    rows = rows.reshape(len(rows), -1)
    height = max(1, _BLOCK.get(rows.device.type, _HOST_BLOCK) // rows.shape[1])
    for block, part in zip(rows.split(height), sums.split(height), strict=True):
        values = block.float()
        part.copy_(_pairwise(values * values))


def _pairwise(values: Tensor) -> Tensor:
    """(R, n) -> (R,): the right half of the columns is added to the left one until one is left. Overwrites values."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0]
