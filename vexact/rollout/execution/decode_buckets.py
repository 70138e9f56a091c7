"""Which sizes of a decode step get a graph of their own. A step runs in the smallest graph that holds it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = ((8, 64), (16, 128), (32, 512), (64, 1 << 30))  # multiples of the first up to the second


@dataclass(frozen=True, slots=True)
class GraphKey:
    """The shape of one captured graph: B rows, of at most ``num_keys`` keys each."""

    batch_size: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class DecodeBuckets:
    """The shapes there may be.

    >>> DecodeBuckets((1, 2, 4), (2048, 4096)).find(3, 100)
    GraphKey(batch_size=4, num_keys=2048)
    """

    batch_sizes: tuple[int, ...]  # ascending
    num_keys: tuple[int, ...]  # ascending

    def find(self, batch_size: int, num_keys: int) -> GraphKey | None:
        """The smallest shape that holds ``batch_size`` rows of ``num_keys`` keys, or None."""
        row, column = bisect_left(self.batch_sizes, batch_size), bisect_left(self.num_keys, num_keys)
        if row == len(self.batch_sizes) or column == len(self.num_keys):
            return None
        return GraphKey(self.batch_sizes[row], self.num_keys[column])


def batch_buckets(max_num_seqs: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch sizes to capture: ``wanted``, those above ``max_num_seqs`` counting as it; else a ladder up to it.

    >>> batch_buckets(20)
    (1, 2, 4, 8, 16, 20)
    """
    if wanted is not None:
        return tuple(sorted({min(size, max_num_seqs) for size in wanted}))
    sizes, low = {1, 2, 4, max_num_seqs}, 0
    for step, high in _STEPS:
        sizes.update(range(low + step, min(high, max_num_seqs) + 1, step))
        low = high
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def key_buckets(chunk: int, max_model_len: int) -> tuple[int, ...]:
    """Key counts to capture. ``chunk`` keys are the work of one attention program: doubling bounds the idle ones.

    >>> key_buckets(2048, 10_000)
    (2048, 4096, 8192, 10000)
    """
    counts = []
    while chunk < max_model_len:
        counts.append(chunk)
        chunk *= 2
    return (*counts, max_model_len)
