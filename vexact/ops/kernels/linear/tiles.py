"""What a tile is, and the tiles for products that cannot use the tuned table.

A product is C (m, n) = A (m, k) Bᵀ (n, k). Three layouts occur: ``forward`` (x and the weight run along k),
``grad_input`` (the weight runs along n) and ``grad_weight`` (both operands run along m and n; k counts tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["forward", "grad_input", "grad_weight"]
ShapeKey = tuple[Layout, int, int]
LARGE = 1 << 62  # a bound no batch exceeds


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch parameters of one matrix product: a choice of speed only, every tile gives the same bits.

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


# Walked in order: the first entry whose bound holds m is taken. These run where descriptors cannot: before sm_90, and
# for strides or addresses that are not multiples of 16 bytes. They fit the shared memory of sm_80.
POINTER_TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile("pointer", 16, 32, 128, 4, 5)),
    (32, Tile("pointer", 32, 32, 128, 4, 4)),
    (64, Tile("pointer", 64, 64, 64, 4, 5)),
    (256, Tile("pointer", 64, 128, 64, 4, 4)),
    (LARGE, Tile("pointer", 128, 128, 32, 4, 4)),
)
# fp32 products run on the ordinary multiply-add units, whose operands live in registers.
FLOAT32_TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile("pointer", 16, 32, 32, 4, 3)),
    (LARGE, Tile("pointer", 64, 64, 16, 4, 3)),
)
# An fp32 result on sm_100 passes from tensor memory through shared memory as a whole tile.
TENSOR_MEMORY_TILE = Tile("tma", 128, 128, 64, 4, 4, 8, 2, 1)
TENSOR_MEMORY_STAGING = 224 * 1024
