"""One step off: the next step's samples are generated while this step trains, on GPUs of their own."""

from __future__ import annotations

import numpy as np

from vexact.report import Timers
from vexact.trainer.collect import Collected, Collector
from vexact.types import SampleGroup


class Ahead:
    """At most one step ahead, so no sample is more than one weights version older than the trainer.

    Only the sampling of a step's first batch runs beside the training; scores, and further batches of dynamic
    sampling, follow when it is waited for, still with the same weights.
    """

    def __init__(self, collector: Collector, timers: Timers) -> None:
        """``timers``: those of ``collector``."""
        self._collector, self._timers = collector, timers
        self._begun: int | None = None
        self._ready: tuple[Collected, dict[str, float]] | None = None

    def begin(self, step: int, cursor: int) -> None:
        """Starts on ``step`` with the rollout's present weights, and returns."""
        self._collector.begin(step, cursor)
        self._begun = step

    def finish(self, cursor: int) -> None:
        """Waits for the step that was begun: only then may the rollout get other weights."""
        if self._begun is not None:
            self._ready = self._collector.collect(self._begun, cursor), self._timers.take()
            self._begun = None

    def take(self, step: int, cursor: int) -> tuple[Collected, dict[str, float]]:
        """The groups of ``step``, and ``timing_s/*`` of how they were made; collects them now if nobody has yet."""
        if self._ready is None:
            return self._collector.collect(step, cursor), self._timers.take()
        ready, self._ready = self._ready, None
        return ready


def staleness_metrics(version: int, groups: list[SampleGroup]) -> dict[str, float]:
    """How many weights versions the trainer is ahead of the samples it trains on."""
    behind = np.array([version - sample.weights_version for group in groups for sample in group.samples])
    return {"rollout/staleness/mean": float(behind.mean()), "rollout/staleness/max": float(behind.max())}
