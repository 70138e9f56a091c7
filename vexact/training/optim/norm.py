"""The 2-norm of all gradients in one fixed order of additions, on any device and over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vexact.ops.square_sums import num_stretches, square_sums
from vexact.training.parallel.ranks import Ranks, local


def total_norm(gradients: Sequence[Tensor], ranks: Ranks) -> float:
    """The norm of whole gradients of which every rank holds some rows; NaN or infinite if a gradient or square is.

    ``square_sums`` adds the squares of stretches of rows in fp32; those of all rows of all gradients, in order, are
    added pairwise in fp64. A sharded gradient has whole rows on a rank, so the order knows nothing of the ranks.
    Waits for the device once.
    """
    if not gradients:
        return 0.0
    widths = [gradient.shape[1:].numel() for gradient in gradients]
    counts = [num_stretches(width) for width in widths]  # sums per row
    sizes = [-(-len(g) // ranks.world_size) * count for g, count in zip(gradients, counts, strict=True)]
    rows = [local(gradient) for gradient in gradients]
    sums = torch.zeros(sum(sizes), dtype=torch.float32, device=rows[0].device)
    matrices = [part.reshape(len(part), width) for part, width in zip(rows, widths, strict=True)]
    square_sums(matrices, sums, list(accumulate(sizes, initial=0))[:-1])
    if ranks.world_size > 1:  # the last ranks have fewer rows than there is room for
        parts = ranks.gather(sums).split(sizes, dim=1)
        held = [part.flatten()[: len(g) * n] for part, g, n in zip(parts, gradients, counts, strict=True)]
        sums = torch.cat(held)
    return math.sqrt(_add_pairwise(sums.double()).item())


def _add_pairwise(values: Tensor) -> Tensor:
    """(n,) -> (): the right half is added to the left one until one is left. Overwrites ``values``; none give 0."""
    width = len(values)
    while width > 1:
        half = width // 2
        values[:half] += values[width - half : width]
        width -= half
    return values[:1].sum()
