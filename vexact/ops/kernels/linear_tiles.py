"""Which tile computes a matrix product: a choice of speed only, for every tile gives the same bits.

A product is C (m, n) = A (m, k) Bᵀ (n, k). Three layouts occur: ``forward`` (x and the weight run along k),
``grad_input`` (the weight runs along n) and ``grad_weight`` (both operands run along m and n; k counts tokens). The
tuned rows live in ``linear_tile_table``; a shape that was never tuned takes the tile of the nearest one that was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal

import torch

Layout = Literal["forward", "grad_input", "grad_weight"]
ShapeKey = tuple[Layout, int, int]


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one matrix product.

    ``waves`` is the number of persistent programs per multiprocessor; 0 launches one program per tile. ``splits``
    (column strips of the epilogue) and ``waves`` are read by the descriptor kernel alone.
    """

    kernel: Literal["tma", "pointer"]
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    splits: int = 1
    waves: int = 0
    swap: bool = False


# Walked in order: the first entry whose row bound holds m is taken. These run where descriptors cannot: before sm_90,
# and for strides or addresses that are not multiples of 16 bytes. They fit the shared memory of sm_80.
POINTER_TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile("pointer", 16, 32, 128, 4, 5)),
    (32, Tile("pointer", 32, 32, 128, 4, 4)),
    (64, Tile("pointer", 64, 64, 64, 4, 5)),
    (256, Tile("pointer", 64, 128, 64, 4, 4)),
    (1 << 62, Tile("pointer", 128, 128, 32, 4, 4)),
)
# fp32 products run on the ordinary multiply-add units, whose operands live in registers.
FLOAT32_TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile("pointer", 16, 32, 32, 4, 3)),
    (1 << 62, Tile("pointer", 64, 64, 16, 4, 3)),
)


def first_fitting(rows: tuple[tuple[int, Tile], ...], size: int) -> Tile:
    """The tile of the first entry whose bound is at least ``size``."""
    return next(tile for bound, tile in rows if size <= bound)


@lru_cache(maxsize=None)
def nearest_shape(layout: Layout, first: int, second: int) -> ShapeKey:
    """The tuned shape closest to (first, second) in octaves."""
    from vexact.ops.kernels.linear_tile_table import TUNED

    def distance(key: ShapeKey) -> float:
        return abs(log2(key[1] / first)) + abs(log2(key[2] / second))

    return min((key for key in TUNED if key[0] == layout), key=distance)


def select_tile(layout: Layout, m: int, n: int, k: int, dtype: torch.dtype, descriptors: bool) -> Tile:
    """The tile for one product; ``descriptors`` says whether every operand can be fetched through a descriptor."""
    from vexact.ops.kernels.linear_tile_table import TUNED

    if dtype == torch.float32:
        return first_fitting(FLOAT32_TILES, m)
    if not descriptors:
        return first_fitting(POINTER_TILES, m)
    if layout == "grad_weight":
        return first_fitting(TUNED[nearest_shape(layout, m, n)], k)
    return first_fitting(TUNED[nearest_shape(layout, n, k)], m)
