"""One step off: the next step's samples are generated while this step trains, on other GPUs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from vexact import interrupt
from vexact.config import Config
from vexact.report import Timers
from vexact.trainer.collect import Collected, Collector
from vexact.trainer.workers import Workers
from vexact.types import SampleGroup

POLL_S = 0.2


class Ahead:
    """Collects in a thread. At most one step ahead, so a sample is at most one weights version older than the trainer."""

    def __init__(self, config: Config, workers: Workers) -> None:
        self._timers = Timers()
        self._collector = Collector(config, workers, self._timers)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._step: int | None = None
        self._future: Future[tuple[Collected, dict[str, float]]] | None = None

    def start(self, step: int, cursor: int) -> None:
        """Begins on ``step`` with the rollout's present weights."""
        assert self._future is None, "one step ahead, not more"
        self._step, self._future = step, self._pool.submit(self._collect, step, cursor)

    def take(self, step: int, cursor: int) -> tuple[Collected, dict[str, float]]:
        """The groups of ``step``, as ``Collector.collect`` gives them, and ``timing_s/*`` of how they were made."""
        if self._future is None:
            return self._collect(step, cursor)
        assert self._step == step, "steps are taken in the order in which they were begun"
        self.wait()
        collected = self._future.result()
        self._future = None
        return collected

    def wait(self) -> None:
        """Until nothing is being generated: only then may the rollout get other weights. Raises what collecting raised."""
        while self._future is not None:
            interrupt.check()
            done, _ = wait([self._future], timeout=POLL_S)
            if done:
                self._future.result()
                return

    def close(self) -> None:
        """Forgets what is under way; its thread ends with its call."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _collect(self, step: int, cursor: int) -> tuple[Collected, dict[str, float]]:
        collected = self._collector.collect(step, cursor)
        return collected, self._timers.take()


def staleness_metrics(version: int, groups: list[SampleGroup]) -> dict[str, float]:
    """How many weights versions the trainer is ahead of the samples it trains on."""
    behind = np.array([version - sample.weights_version for group in groups for sample in group.samples])
    return {"rollout/staleness/mean": float(behind.mean()), "rollout/staleness/max": float(behind.max())}
