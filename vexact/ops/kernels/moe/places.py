"""Where the rows of a grouped product are: tiles of places, found by each program from the offsets on the device.

Experts own consecutive places; every expert's last tile may be ragged, and an expert without places has no tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tiles_of_experts(offsets_ptr, num_experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(EXPERTS,) number of tiles of each expert, and the number up to and with it."""
    experts = tl.arange(0, EXPERTS)
    known = experts < num_experts
    begin = tl.load(offsets_ptr + experts, mask=known, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=known, other=0)
    tiles = (end - begin + (BLOCK_M - 1)) // BLOCK_M
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_tile(tile, tiles, past, offsets_ptr, BLOCK_M: tl.constexpr):
    """Expert of a tile that exists, its first place, and the end of the expert's places.

    Experts before it are counted, and their tiles added, in one reduction.
    """
    both = tl.sum(tl.where(past <= tile, tiles.to(tl.int64) + (1 << 32), 0), 0)
    expert = (both >> 32).to(tl.int32)
    earlier = (both & 0xFFFFFFFF).to(tl.int32)
    first = tl.load(offsets_ptr + expert) + (tile - earlier) * BLOCK_M
    return expert, first, tl.load(offsets_ptr + expert + 1)


def most_tiles(places: int, experts: int, block_m: int) -> int:
    """No division of ``places`` among ``experts`` has more tiles.

    >>> most_tiles(8, 128, 16)
    8
    >>> most_tiles(4096, 128, 128)
    159
    """
    return (places + min(places, experts) * (block_m - 1)) // block_m
