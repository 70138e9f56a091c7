"""Chooses the tile of a grouped product from its shape and from the places an expert has on average.

Experts have more or fewer places than that, but no choice changes a bit. ``benchmarks/moe/speed.py`` has timings.
"""

from __future__ import annotations

import torch

from vexact.ops.kernels.linear.select import first_fitting
from vexact.ops.kernels.linear.tiles import LARGE, Tile

Entries = tuple[tuple[int, Tile], ...]  # largest average number of places of an expert, tile

FORWARD: Entries = (
    (8, Tile("tma", 16, 64, 128, 4, 3, swap=True)),
    (32, Tile("tma", 32, 64, 128, 4, 3)),
    (64, Tile("tma", 64, 128, 64, 4, 4)),
    (LARGE, Tile("tma", 128, 256, 64, 8, 4, splits=4, waves=1)),
)
GATHERED: Entries = (
    *FORWARD[:-1],
    (512, Tile("tma", 128, 256, 64, 8, 4, splits=4)),
    (LARGE, Tile("tma", 128, 256, 64, 8, 4, splits=4, waves=1)),
)
GATED: Entries = (
    (16, Tile("tma", 16, 64, 128, 4, 3, swap=True)),
    (32, Tile("tma", 32, 64, 64, 4, 5, swap=True)),
    (512, Tile("tma", 128, 128, 64, 8, 4, splits=2)),
    (LARGE, Tile("tma", 128, 128, 64, 8, 4, splits=2, waves=1)),
)
GRAD_WEIGHT = Tile("tma", 128, 128, 32, 4, 6)
GRAD_WEIGHT_SUM = Tile("tma", 128, 128, 32, 8, 6)  # a sum and a gradient would not fit the registers of 4 warps
# Before sm_90, and for strides or addresses that are not multiples of 16 bytes. They fit the shared memory of sm_80.
POINTER: Entries = (
    (16, Tile("pointer", 16, 32, 128, 4, 4)),
    (32, Tile("pointer", 32, 32, 128, 4, 3)),
    (LARGE, Tile("pointer", 64, 64, 64, 4, 3)),
)
FLOAT32: Entries = (
    (16, Tile("pointer", 16, 32, 32, 4, 2)),
    (LARGE, Tile("pointer", 64, 64, 16, 4, 2)),
)
POINTER_GRAD_WEIGHT = Tile("pointer", 64, 64, 64, 4, 3)
FLOAT32_GRAD_WEIGHT = Tile("pointer", 64, 64, 16, 4, 2)


def product_tile(places: int, experts: int, dtype: torch.dtype, descriptors: bool, gather: bool, gated: bool) -> Tile:
    """The tile of a product of ``places`` rows with the matrices of ``experts``."""
    average = places // experts
    if dtype == torch.float32:
        return first_fitting(FLOAT32, average)
    if not descriptors:
        return first_fitting(POINTER, average)
    return first_fitting(GATED if gated else GATHERED if gather else FORWARD, average)


def grad_weight_tile(dtype: torch.dtype, descriptors: bool, summed: bool = False) -> Tile:
    """The tile of a weight gradient, whose places are its depth, or of what is added to a sum of gradients."""
    if dtype == torch.float32:
        return FLOAT32_GRAD_WEIGHT
    if not descriptors:
        return POINTER_GRAD_WEIGHT
    return GRAD_WEIGHT_SUM if summed else GRAD_WEIGHT
