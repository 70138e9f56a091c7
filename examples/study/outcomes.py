"""What a run is measured by, from its curves. Defined in docs/study.md before the runs; ``fallen`` was added after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LAST = 10  # steps that the final reward is the mean of
THRESHOLD_WINDOW = 5
SPIKE_FACTOR, SPIKE_WINDOW = 3.0, 10
COLLAPSE_SHARE = 0.5
LEARNED = 0.1  # of the best reward; below it a collapse cannot be told from never having learned

OUTCOMES = {
    "exact_score": "score of the trained weights, sampled exactly",
    "final_reward": f"reward of the last {LAST} steps, as sampled",
    "steps_to_threshold": "steps to the threshold",
    "collapsed": "collapsed",
    "fallen": f"collapsed from a mean reward of at least {LEARNED}",
    "spikes": "gradient-norm spikes",
}
MISMATCHES = ("kl", "probs_diff", "share_different", "routes_share_different")


def outcomes(row: Mapping[str, Any], threshold: float) -> dict[str, float]:
    """All of ``OUTCOMES`` and ``MISMATCHES`` of one run; NaN where the run does not say.

    A run that stopped itself has collapsed, its exact score is 0, and steps that it did not take have the reward 0.
    Where samples are of other weights by design, most steps compare no bits, and the KL is ``actor/ppo_kl``.
    """
    steps = int(row["steps"])
    stopped = row["status"] != "done"
    reward = np.zeros(steps)
    reward[: len(row["reward"])] = row["reward"]
    final = float(reward[-LAST:].mean())
    collapsed = stopped or has_collapsed(reward)
    compared = _total(row["tokens_compared"])
    is_compared = np.isfinite(row["tokens_compared"]).sum() > len(row["tokens_compared"]) / 2
    return {
        "exact_score": 0.0 if stopped else float(row["exact_score"]),
        "final_reward": final,
        "steps_to_threshold": float(steps_to(reward, threshold)),
        "collapsed": float(collapsed),
        "fallen": float(collapsed and running_mean(reward, LAST).max() >= LEARNED),
        "spikes": float(count_spikes(row["grad_norm"])),
        "kl": _median(row["k3_kl"] if is_compared else row["ppo_kl"]),
        "probs_diff": _median(row["probs_diff"]) if is_compared else math.nan,
        "share_different": _total(row["tokens_different"]) / compared if is_compared else math.nan,
        "routes_share_different": float(np.sum(row["routes_different"])) / compared if is_compared else math.nan,
    }


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Of every ``window`` neighbours (of all values, if there are no more), (S - window + 1,)."""
    window = min(window, len(values))
    return np.convolve(values, np.ones(window) / window, "valid")


def steps_to(reward: np.ndarray, threshold: float) -> int:
    """The first step at which the mean of the last ``THRESHOLD_WINDOW`` rewards is at least ``threshold``, or one more
    than there are steps."""
    reached = np.flatnonzero(running_mean(reward, THRESHOLD_WINDOW) >= threshold - 1e-12)
    return int(reached[0]) + THRESHOLD_WINDOW if len(reached) else len(reward) + 1


def has_collapsed(reward: np.ndarray) -> bool:
    """Whether the last steps' mean reward is less than half of the best that as many neighbouring steps had."""
    means = running_mean(reward, LAST)
    return bool(means[-1] < COLLAPSE_SHARE * means.max())


def count_spikes(grad_norm: Sequence[float]) -> int:
    """Steps whose gradient norm is more than ``SPIKE_FACTOR`` times the median of the ``SPIKE_WINDOW`` steps before, or
    not finite."""
    norms = np.asarray(grad_norm, dtype=np.float64)
    count = int((~np.isfinite(norms)).sum())
    for step in range(SPIKE_WINDOW, len(norms)):
        before = norms[step - SPIKE_WINDOW : step]
        before = before[np.isfinite(before)]
        if len(before) and np.isfinite(norms[step]) and norms[step] > SPIKE_FACTOR * np.median(before):
            count += 1
    return count


def _median(values: Sequence[float]) -> float:
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    return float(np.median(finite)) if len(finite) else math.nan


def _total(values: Sequence[float]) -> float:
    return float(np.nansum(np.asarray(values, dtype=np.float64)))
