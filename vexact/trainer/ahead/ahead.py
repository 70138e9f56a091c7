"""The next step's samples are generated while this step trains, on GPUs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vexact.trainer.ahead.stored import write_collected
from vexact.trainer.step.collect import Collected, Collector
from vexact.types import SampleGroup


class StaleSamplesError(RuntimeError):
    """Samples come from other weights than the step may train on."""


class Ahead:
    """Collects the groups of every step, at most ``depth`` steps ahead of the training: 0 or 1.

    One step ahead, no sample is more than one weights version older than the trainer. Only the sampling of a step's
    first batch runs beside the training; scores, and further batches of dynamic sampling, follow when it is waited
    for, still with the same weights.
    """

    def __init__(self, collector: Collector, depth: int, last_step: int, ready: tuple[int, Collected] | None) -> None:
        """``ready``: a step and its groups, which an earlier life of the run has generated ahead."""
        self._collector, self.depth, self._last = collector, depth, last_step
        self._begun: tuple[int, int] | None = None  # step and data cursor
        self._ready = ready
        self._failure: Exception | None = None

    def begin(self, step: int, cursor: int) -> None:
        """Starts on ``step`` with the rollout's present weights, and returns; does nothing if there is no such step or
        it is not to be ahead."""
        if self.depth and step <= self._last:
            self._collector.begin(step, cursor)
            self._begun = step, cursor

    def finish(self) -> None:
        """Waits for the step that was begun: only then may the rollout get other weights.

        What goes wrong with it is raised by ``take``: the step that trains now is to be reported and saved first.
        """
        if self._begun is None:
            return
        (step, cursor), self._begun = self._begun, None
        try:
            collected = self._collector.collect(step, cursor)
        except Exception as error:
            self._failure = error
            return
        self._ready = step, collected._replace(metrics=collected.metrics | _gen_ahead(collected.metrics))

    def take(self, step: int, cursor: int) -> Collected:
        """The groups of ``step``; collects them now if nobody has yet.

        Raises:
            StaleSamplesError: a sample is of other weights than these, or than those ``depth`` versions before.
            Exception: what went wrong while they were generated ahead.
        """
        if self._failure is not None:
            raise self._failure
        if self._ready is None:
            collected = self._collector.collect(step, cursor)
        else:
            (ready, collected), self._ready = self._ready, None
            assert ready == step, f"step {ready} is ready, step {step} is due"
        self._require_versions(step, collected.groups)
        return collected

    def save(self, directory: Path) -> None:
        """Writes what is ready into a checkpoint, so that whoever goes on from it trains on the same samples."""
        if self._ready is not None:
            write_collected(directory, *self._ready)

    def _require_versions(self, step: int, groups: Sequence[SampleGroup]) -> None:
        found = {sample.weights_version for group in groups for sample in group.samples}
        if len(found) != 1 or not step - 1 - self.depth <= min(found) < step:
            raise StaleSamplesError(
                f"step {step} trains weights version {step - 1} and got samples of version "
                f"{', '.join(map(str, sorted(found)))}; trainer.async_steps={self.depth} allows "
                f"{'one version that is at most 1 older' if self.depth else 'that version only'}"
            )


def staleness_metrics(version: int, groups: Sequence[SampleGroup]) -> dict[str, float]:
    """How many weights versions the trainer, at ``version``, is ahead of the samples it trains on."""
    behind = np.array([version - sample.weights_version for group in groups for sample in group.samples])
    return {"rollout/staleness/mean": float(behind.mean()), "rollout/staleness/max": float(behind.max())}


def _gen_ahead(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds that the engines computed, whoever waited for them."""
    rate = metrics["rollout/decode_tokens_per_s"]
    return {"timing_s/gen_ahead": metrics["rollout/num_tokens"] / rate if rate else 0.0}
