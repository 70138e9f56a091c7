"""Means over seeds with confidence bands, by bootstrap and by Student's t, and tests of many of them at once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
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


def student_band(values: Sequence[float], level: float) -> Band:
    """The interval of the mean by Student's t, for values that are normal (Student 1908). Two values at least."""
    data = np.asarray(values, dtype=np.float64)
    error = data.std(ddof=1) / math.sqrt(len(data))
    low, high = 0.0, 1e4  # t of three degrees of freedom stays below 13 up to a level of 99.9 %
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, len(data) - 1) < level else (low, middle)
    return Band(float(data.mean()), float(data.mean() - high * error), float(data.mean() + high * error), len(data))


def student_p(values: Sequence[float]) -> float:
    """Two-sided, of the mean's being 0. Values without any spread are certain: 1 if they are 0, else 0."""
    data = np.asarray(values, dtype=np.float64)
    error = data.std(ddof=1) / math.sqrt(len(data))
    if error == 0:
        return 1.0 if data[0] == 0 else 0.0
    return 1 - student_within(abs(float(data.mean())) / error, len(data) - 1)


def student_within(t: float, degrees: int) -> float:
    """The probability that Student's t lies within ±``t`` (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):  # the last power of the cosine is degrees - 2
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for their number (Holm 1979): the least level at which each is rejected with all that are smaller."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted
