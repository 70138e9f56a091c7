"""Chooses the tile of a matrix product from its shape. The choice never changes a bit."""

from __future__ import annotations

from functools import cache
from math import log2

import torch

from vexact.ops.kernels.linear.tile_table import TUNED
from vexact.ops.kernels.linear.tiles import (
    FLOAT32_TILES,
    POINTER_TILES,
    TENSOR_MEMORY_STAGING,
    TENSOR_MEMORY_TILE,
    Layout,
    ShapeKey,
    Tile,
)


def first_fitting(entries: tuple[tuple[int, Tile], ...], size: int) -> Tile:
    """The tile of the first entry whose bound is at least ``size``."""
    return next(tile for bound, tile in entries if size <= bound)


@cache
def nearest_shape(layout: Layout, first: int, second: int) -> ShapeKey:
    """The tuned shape closest to (first, second) in octaves."""

    def distance(key: ShapeKey) -> float:
        return abs(log2(key[1] / first)) + abs(log2(key[2] / second))

    return min((key for key in TUNED if key[0] == layout), key=distance)


def select_tile(layout: Layout, m: int, n: int, k: int, dtype: torch.dtype, descriptors: bool) -> Tile:
    """The tile for one product; ``descriptors`` says whether every operand can be fetched through a descriptor."""
    if dtype == torch.float32:
        return first_fitting(FLOAT32_TILES, m)
    if not descriptors:
        return first_fitting(POINTER_TILES, m)
    if layout == "grad_weight":
        return first_fitting(TUNED[nearest_shape(layout, m, n)], k)
    return first_fitting(TUNED[nearest_shape(layout, n, k)], m)


def fit_float32_output(tile: Tile) -> Tile:
    """``tile``, or on GPUs with tensor memory the one to take instead when an fp32 result does not fit beside it."""
    staged = 4 * tile.block_m * tile.block_n + 2 * tile.stages * (tile.block_m + tile.block_n) * tile.block_k
    return TENSOR_MEMORY_TILE if tile.kernel == "tma" and staged > TENSOR_MEMORY_STAGING else tile
