"""Long curves with few points, such that no peak is lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most ``limit`` (>= 4) points: first and last, and the smallest and largest of equal stretches.

    >>> kept_points(np.array([0.0, 0, 9, 0, 0, 0, 0, 0]), 4).tolist()
    [0, 2, 7]
    """
    if len(values) <= limit:
        return np.arange(len(values))
    low = np.where(np.isfinite(values), values, np.inf)
    high = np.where(np.isfinite(values), values, -np.inf)
    edges = np.linspace(0, len(values), (limit - 2) // 2 + 1).astype(int)
    peaks = [
        start + int(extreme(part[start:end]))
        for start, end in pairwise(edges)
        for extreme, part in ((np.argmin, low), (np.argmax, high))
    ]
    return np.unique([0, *peaks, len(values) - 1])


def stretch_means(values: np.ndarray, limit: int) -> np.ndarray:
    """Means (…, B) of B <= ``limit`` equal stretches of the last axis."""
    if values.shape[-1] <= limit:
        return values
    edges = np.linspace(0, values.shape[-1], limit + 1).astype(int)
    sums = np.add.reduceat(values, edges[:-1], axis=-1)
    return np.asarray(sums / np.diff(edges))


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means over the last ``window`` values that are finite, fewer at the start.

    >>> running_mean(np.array([0.0, 1.0, np.nan, 2.0]), 2).tolist()
    [0.0, 0.5, 1.0, 2.0]
    """
    filled = np.isfinite(values)
    total, number = _running_sum(np.where(filled, values, 0.0), window), _running_sum(filled.astype(float), window)
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def _running_sum(values: np.ndarray, window: int) -> np.ndarray:
    """Over the last ``window`` values. A sum is of these alone: a difference of two sums from the start on would carry
    what is left of a peak far back. Of stretches of one window's length it is the end of one and the start of the
    next."""
    stretches = np.pad(values, (0, -len(values) % window)).reshape(-1, window)
    starts = np.cumsum(stretches, axis=1).ravel()[: len(values)]
    ends = np.cumsum(stretches[:, ::-1], axis=1)[:, ::-1].ravel()[: len(values)]
    last = np.arange(len(values)) % window == window - 1
    starts[window:] += np.where(last[window:], 0.0, ends[1 : max(1, len(values) - window + 1)])
    return np.asarray(starts)
