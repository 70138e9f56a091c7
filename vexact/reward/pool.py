"""Grading many samples at once, each with a deadline of its own."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from vexact import interrupt
from vexact.reward.outcome import Outcome
from vexact.reward.process import WorkerProcess
from vexact.reward.run import START_TIMEOUT_S, Run
from vexact.reward.seal import seal
from vexact.reward.spec import GradeRequest, RewardError, RewardSpec, ScoreFunction, load_function
from vexact.reward.worker import grade
from vexact.types import Score

log = logging.getLogger(__name__)
_MAX_FAILED_STARTS = 5  # in a row; the system may be short of memory for a moment


class RewardPool:
    """A pool of grader processes that survives graders which raise, hang or crash.

    A grader that raises, crashes, or returns something that is not a number costs one sample (``status="error"``); one
    that runs longer than ``timeout_s`` is killed with everything it started and costs one sample
    (``status="timeout"``). Graders are sealed as ``spec.sandbox`` says; ``lacking`` names what this machine cannot
    give. ``num_workers=0`` grades in the calling process: no deadline, no sandbox, and a crash is a crash.
    """

    def __init__(
        self, num_workers: int = 2, spec: RewardSpec | None = None, timeout_s: float = 30.0, recycle_after: int = 20_000
    ) -> None:
        """Start the workers and wait until the function is loaded.

        Args:
            num_workers: processes; 0 grades inline.
            spec: the function; the built-in graders by default.
            timeout_s: deadline per sample, import time of the built-in graders not counted.
            recycle_after: replace a worker after so many samples, against leaks in graders.

        Raises:
            ValueError: an argument is out of range.
            RewardError: the user's file or function cannot be loaded.
        """
        if num_workers < 0:
            raise ValueError(f"reward.num_workers={num_workers} is negative; use 0 to grade in the driver process")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"reward.timeout_s={timeout_s} must be a positive number of seconds")
        if recycle_after < 1:
            raise ValueError(f"recycle_after={recycle_after} must be at least 1")
        self.num_workers, self.timeout_s, self.recycle_after = num_workers, timeout_s, recycle_after
        self.spec = spec or RewardSpec()
        for path in self.spec.sandbox.write:
            if not os.path.exists(os.path.expanduser(path)):
                raise ValueError(f"reward.sandbox.write names {path}, which does not exist; make it or leave it out")
        self.lacking: dict[str, str] = {}
        self.had_a_worker = False
        self._failed_starts = 0
        self._workers: list[WorkerProcess] = []
        self._logged: set[str] = set()
        self._window: list[Outcome] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)  # also runs at interpreter exit
        self._function = load_function(self.spec) if num_workers == 0 else None
        self._wait_until_ready()

    def score(self, requests: Sequence[GradeRequest]) -> list[Score]:
        """Grade every request, in order.

        Raises:
            RewardError: every sample failed, a worker cannot start, the first samples all ran out of time, or an
                answer is not for the request in its place.
        """
        if self._function is not None:
            outcomes = self._score_inline(self._function, requests)
        else:
            outcomes = self._score_in_workers(requests)
        if [request.key for request in requests] != [outcome.key for outcome in outcomes]:
            raise RewardError("a reward worker answered for other samples than it was given")
        for outcome in outcomes:
            self._log_first(outcome)
        self._window.extend(outcomes)
        _require_some_success(outcomes)
        self._warn_of_better_failures(outcomes)
        return [
            Score(each.value, each.extra or {}, each.status, each.message, seal(each.key, each.value))
            for each in outcomes
        ]

    def take_metrics(self) -> dict[str, float]:
        """``reward/{error_ratio,timeout_ratio}`` and ``reward/time_s/{mean,max}`` since the last call."""
        window, self._window = self._window, []
        if not window:
            return {}
        status = Counter(outcome.status for outcome in window)
        seconds = [outcome.seconds for outcome in window]
        return {
            "reward/error_ratio": status["error"] / len(window),
            "reward/timeout_ratio": status["timeout"] / len(window),
            "reward/time_s/mean": sum(seconds) / len(window),
            "reward/time_s/max": max(seconds),
        }

    def close(self) -> None:
        """End all workers and whatever their graders started. Idempotent."""
        _kill_all(self._workers)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score_inline(self, function: ScoreFunction, requests: Sequence[GradeRequest]) -> list[Outcome]:
        outcomes = []
        for request in requests:
            interrupt.check()
            outcomes.append(grade(function, request, self.spec.kwargs))
        return outcomes

    def _score_in_workers(self, requests: Sequence[GradeRequest]) -> list[Outcome]:
        self._fill_up()
        run = Run(self, requests)
        try:
            while run.num_open:
                run.turn()
        finally:
            # After an error or Ctrl-C a worker may still be grading for this call; its answers must not meet the next.
            for worker in [worker for worker in self._workers if worker.pending]:
                self.discard(worker)
        for worker in [worker for worker in self._workers if worker.num_graded >= self.recycle_after]:
            self.discard(worker)
        self._fill_up()
        return run.outcomes()

    def _wait_until_ready(self) -> None:
        self._fill_up()
        run = Run(self, [])
        try:
            while not all(worker.is_ready for worker in self._workers):
                run.turn()
        except BaseException:
            self.close()
            raise
        if self.lacking:
            what = "; ".join(f"{name}: {reason}" for name, reason in self.lacking.items())
            log.warning("this machine holds graders less tightly than others (vexact doctor says how): %s", what)

    def discard(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def replace(self, worker: WorkerProcess) -> None:
        self.discard(worker)
        self._fill_up()

    def restart(self, worker: WorkerProcess, reason: str) -> None:
        """Replace a worker that did not start.

        Raises:
            RewardError: none starts any more.
        """
        self._failed_starts += 1
        if self._failed_starts >= (_MAX_FAILED_STARTS if self.had_a_worker else 2):
            times = f" ({self._failed_starts} workers in a row)" if self._failed_starts > 1 else ""
            raise RewardError(f"a reward worker {reason}{times}; its error output is above")
        log.warning("a reward worker %s; starting another", reason)
        time.sleep(0.05 * 2**self._failed_starts)
        self.replace(worker)

    def note_ready(self, worker: WorkerProcess) -> None:
        """A worker has loaded the reward function."""
        self.lacking, self.had_a_worker, self._failed_starts = worker.lacking, True, 0

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        return self._workers

    def _fill_up(self) -> None:
        while len(self._workers) < self.num_workers:
            self._workers.append(WorkerProcess(self.spec, self.timeout_s, START_TIMEOUT_S))

    def _warn_of_better_failures(self, outcomes: Sequence[Outcome]) -> None:
        """Once: a failed sample scores 0, and where others score less, training teaches to break graders."""
        graded = [outcome.value for outcome in outcomes if outcome.status == "ok"]
        if "better failure" not in self._logged and len(graded) < len(outcomes) and min(graded) < 0:
            self._logged.add("better failure")
            log.warning(
                "%d of %d samples failed to be graded and score 0, more than the lowest that was graded, %g: training "
                "rewards what breaks the grader; let the function catch its errors, or return no number below 0",
                *(len(outcomes) - len(graded), len(outcomes), min(graded)),
            )

    def _log_first(self, outcome: Outcome) -> None:
        if outcome.status == "ok" or outcome.kind in self._logged:
            return
        self._logged.add(outcome.kind)
        trace = f"\n{outcome.traceback}" if outcome.traceback else ""
        log.warning("a reward failed (further failures of this kind are only counted): %s%s", outcome.message, trace)


def _require_some_success(outcomes: Sequence[Outcome]) -> None:
    failures = Counter(outcome.message for outcome in outcomes if outcome.status != "ok")
    if outcomes and failures.total() == len(outcomes):
        message, count = failures.most_common(1)[0]
        raise RewardError(f"every one of {len(outcomes)} samples failed: {message} ({count} times)")


def _kill_all(workers: list[WorkerProcess]) -> None:
    for worker in workers:
        worker.release()
    while workers:
        workers.pop().kill()
