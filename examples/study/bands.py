"""Means over seeds with bootstrap confidence bands, and differences at equal seeds."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Band(NamedTuple):
    """A mean over seeds, and the interval in which the level's share of its bootstrap means lies."""

    mean: float
    low: float
    high: float
    seeds: int

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value


def band(values: Sequence[float], level: float, name: str = "") -> Band:
    """Percentile bootstrap of the mean (Efron 1979): ``RESAMPLES`` times, all values are drawn with replacement.

    Args:
        values: one per seed.
        level: such as 0.95.
        name: of what is measured; the draws depend on it, and on nothing else.
    """
    data = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    means = data[draw.integers(len(data), size=(RESAMPLES, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Band(float(data.mean()), float(low), float(high), len(data))


def difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float, name: str = ""
) -> Band | None:
    """The band of values - reference over the seeds that both have; None if there is none.

    Runs of one seed share prompts and the noise of their draws, so what they have in common cancels.
    """
    seeds = sorted(values.keys() & reference.keys())
    if not seeds:
        return None
    return band([values[seed] - reference[seed] for seed in seeds], level, name)
