"""What the host knows of a batch without reading device memory: its sizes."""

from __future__ import annotations

from typing import NamedTuple

from vexact.ops.kernels.sizes import cdiv

TILE = 128  # query rows of a tile, and keys of a step


class Batch(NamedTuple):
    """Sizes of a batch of attention; upper bounds where that is all the host has."""

    rows: int  # query rows of all sequences
    sequences: int
    longest_q: int
    longest_k: int
    causal: bool
    skip_up_to: int = 0  # sequences of so few query rows are no part of it

    def average_tile(self) -> tuple[float, float]:
        """(query rows, steps over 128 keys) of an average tile of 128 query rows.

        The longest sequence is as long as the host is told; the others share the remaining rows evenly and are taken to
        have as many keys.

        >>> Batch(16384, 2, 8192, 8192, True).average_tile()
        (128.0, 32.0)
        >>> Batch(16384, 256, 64, 64, True).average_tile()
        (64.0, 1.0)
        >>> Batch(576, 65, 512, 4096, True, skip_up_to=1).average_tile()  # 64 sequences decode beside a chunk
        (128.0, 30.0)
        """
        tiles, steps = _sequences(1, self.longest_q, self.longest_k, self.causal)
        rows = self.longest_q
        others, rest = self.sequences - 1, self.rows - self.longest_q
        if others > 0 and rest > others * self.skip_up_to:
            more_tiles, more_steps = _sequences(others, rest / others, rest / others, self.causal)
            tiles, steps, rows = tiles + more_tiles, steps + more_steps, rows + rest
        return rows / tiles, steps / tiles

    def tile_work(self) -> float:
        """Query rows times steps of an average tile: what warp-specialised kernels need enough of, since short
        sequences leave tiles empty, and a tile of few steps is over before its pipeline is full.

        >>> Batch(16384, 2, 8192, 8192, True).tile_work()
        4096.0
        """
        rows, steps = self.average_tile()
        return rows * steps


def _sequences(count: int, q_len: float, k_len: float, causal: bool) -> tuple[float, float]:
    """Tiles of so many equal sequences, and the steps of all of them."""
    tiles = count * max(1, cdiv(round(q_len), TILE))
    keys = k_len - q_len / 2 if causal else k_len
    return tiles, tiles * max(1.0, keys / TILE)
