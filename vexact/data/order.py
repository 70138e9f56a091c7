"""Which rows come next, as a pure function of a cursor, so that a resumed run reads exactly what it would have read."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class DataOrder:
    """Endless row order: every epoch is a permutation of all rows keyed by ``(seed, epoch)``.

    The only state is an integer cursor that the caller owns: the number of rows read since the start of training.

    >>> order = DataOrder(num_rows=3, seed=0, shuffle=False)
    >>> order.take(cursor=2, count=3)
    [2, 0, 1]
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True) -> None:
        """Raises ValueError for an empty dataset or a negative seed."""
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows}: a data order needs at least one row")
        if seed < 0:
            raise ValueError(f"data.seed={seed} is negative; use 0 or a positive integer")
        self.num_rows = num_rows
        self.seed = seed
        self.shuffle = shuffle

    def take(self, cursor: int, count: int) -> list[int]:
        """Row indices of positions ``cursor .. cursor + count - 1``; crosses epochs as needed."""
        if cursor < 0 or count < 0:
            raise ValueError(f"cursor={cursor} and count={count} must not be negative")
        rows: list[int] = []
        while len(rows) < count:
            epoch, offset = divmod(cursor + len(rows), self.num_rows)
            wanted = count - len(rows)
            rows.extend(self._permutation(epoch)[offset : offset + wanted].tolist())
        return rows

    def epoch(self, cursor: int) -> int:
        """The epoch that the row at ``cursor`` belongs to."""
        return cursor // self.num_rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return _permutation(self.num_rows, self.seed, epoch)


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """(num_rows,) int64.

    The argsort of raw Philox words, not ``Generator.permutation``: NumPy keeps the streams of its bit generators across
    releases, but not the algorithms of ``Generator``.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(words, kind="stable")
