"""Grading many samples at once, each with a deadline of its own."""

from __future__ import annotations

import logging
import selectors
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from vexact.reward.process import WorkerProcess
from vexact.reward.spec import GradeRequest, Outcome, RewardError, RewardSpec, load_function
from vexact.reward.worker import grade
from vexact.types import Score

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_MAX_BATCH = 32
_MIN_TIMEOUTS_TO_GIVE_UP = 16


class RewardPool:
    """A pool of grader processes that survives graders which raise, hang or crash.

    A grader that raises, or returns something that is not a finite number, costs one sample (``status="error"``); one
    that runs longer than ``timeout_s`` is killed with everything it started and costs one sample
    (``status="timeout"``). ``num_workers=0`` grades in the calling process: no deadline, and a crash is a crash.
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
            raise ValueError(f"reward.recycle_after={recycle_after} must be at least 1")
        self.num_workers, self.timeout_s, self.recycle_after = num_workers, timeout_s, recycle_after
        self.spec = spec or RewardSpec()
        self._workers: list[WorkerProcess] = []
        self._logged: set[str] = set()
        self._window: list[Outcome] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)  # also runs at interpreter exit
        self._function = load_function(self.spec) if num_workers == 0 else None
        self._wait_until_ready()

    def score(self, requests: Sequence[GradeRequest]) -> list[Score]:
        """Grade every request, in order.

        Raises:
            RewardError: every sample failed, a worker cannot start, or the first samples all ran out of time.
        """
        if self._function is not None:
            outcomes = [grade(self._function, request, self.spec.kwargs) for request in requests]
        else:
            outcomes = self._score_in_workers(requests)
        for outcome in outcomes:
            self._log_first(outcome)
        self._window.extend(outcomes)
        _require_some_success(outcomes)
        return [Score(each.value, each.extra or {}, each.status, each.message) for each in outcomes]

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

    def _score_in_workers(self, requests: Sequence[GradeRequest]) -> list[Outcome]:
        self._fill_up()
        run = _Run(self, requests)
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
        run = _Run(self, [])
        try:
            while not all(worker.is_ready for worker in self._workers):
                run.turn()
        except BaseException:
            self.close()
            raise

    def discard(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def replace(self, worker: WorkerProcess) -> None:
        self.discard(worker)
        self._fill_up()

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        return self._workers

    def _fill_up(self) -> None:
        while len(self._workers) < self.num_workers:
            self._workers.append(WorkerProcess(self.spec, self.timeout_s, _START_TIMEOUT_S))

    def _log_first(self, outcome: Outcome) -> None:
        if outcome.status == "ok" or outcome.kind in self._logged:
            return
        self._logged.add(outcome.kind)
        trace = f"\n{outcome.traceback}" if outcome.traceback else ""
        log.warning("a reward failed (further failures of this kind are only counted): %s%s", outcome.message, trace)


class _Run:
    """The progress of one ``score`` call: what waits, what is with a worker, what is done."""

    def __init__(self, pool: RewardPool, requests: Sequence[GradeRequest]) -> None:
        self._pool, self._requests = pool, requests
        self._waiting = deque(range(len(requests)))
        self._done: dict[int, Outcome] = {}
        self._batch_size = max(1, min(_MAX_BATCH, len(requests) // (4 * max(1, pool.num_workers))))

    @property
    def num_open(self) -> int:
        return len(self._requests) - len(self._done)

    def outcomes(self) -> list[Outcome]:
        return [self._done[index] for index in range(len(self._requests))]

    def turn(self) -> None:
        """Hand out work, read whatever arrives before the next deadline, then enforce deadlines."""
        for worker in self._pool.workers:
            if worker.is_idle and self._waiting:
                self._assign(worker)
        readable = self._wait()
        for worker in readable:
            self._read(worker)
        now = time.monotonic()
        for worker in [each for each in self._pool.workers if each not in readable and not each.is_idle]:
            if now >= worker.deadline:
                self._expire(worker)

    def _assign(self, worker: WorkerProcess) -> None:
        count = min(self._batch_size, len(self._waiting))
        batch = [self._waiting.popleft() for _ in range(count)]
        worker.assign([(index, self._requests[index]) for index in batch])

    def _wait(self) -> list[WorkerProcess]:
        with selectors.DefaultSelector() as selector:
            for worker in self._pool.workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            deadlines = [worker.deadline for worker in self._pool.workers if not worker.is_idle]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            return [key.data for key, _ in selector.select(timeout)]

    def _read(self, worker: WorkerProcess) -> None:
        try:
            messages = worker.channel.receive()
        except EOFError:
            self._lost(worker)
            return
        for message in messages:
            self._handle(worker, message)

    def _handle(self, worker: WorkerProcess, message: tuple[Any, ...]) -> None:
        match message:
            case ("ready",):
                worker.is_ready = True
            case ("failed", reason):
                raise RewardError(reason)
            case ("start",):
                worker.has_started = True
                worker.restart_clock()
            case ("result", index, outcome):
                worker.finish(index)
                self._done[index] = outcome

    def _expire(self, worker: WorkerProcess) -> None:
        if not worker.has_started:
            what = "importing the graders" if worker.is_ready else "loading the reward function"
            raise RewardError(f"a reward worker spent more than {_START_TIMEOUT_S:.0f} s on {what}")
        limit = self._pool.timeout_s
        message = f"the grader took longer than reward.timeout_s={limit:g} s and was killed"
        self._charge(worker, Outcome("timeout", kind="timeout", message=message, seconds=limit))
        self._give_up_if_hopeless()

    def _lost(self, worker: WorkerProcess) -> None:
        reason = worker.exit_reason()
        if not worker.is_ready:
            raise RewardError(f"a reward worker {reason} before it was ready; its error output is above")
        message = f"the grader process {reason} while grading"
        if worker.pending:
            self._charge(worker, Outcome("error", kind="crash", message=message))
        else:
            self._pool.replace(worker)

    def _charge(self, worker: WorkerProcess, outcome: Outcome) -> None:
        """The sample in hand pays; what was queued behind it goes back to the front of the line."""
        victim, *others = worker.pending
        self._done[victim] = outcome
        self._waiting.extendleft(reversed(others))
        worker.pending.clear()
        self._pool.replace(worker)

    def _give_up_if_hopeless(self) -> None:
        """Do not wait ``timeout_s`` for each of thousands of samples when none comes back."""
        needed = max(_MIN_TIMEOUTS_TO_GIVE_UP, 4 * self._pool.num_workers)
        if len(self._done) >= needed and all(outcome.status == "timeout" for outcome in self._done.values()):
            raise RewardError(
                f"the first {len(self._done)} of {len(self._requests)} samples all ran longer than "
                f"reward.timeout_s={self._pool.timeout_s:g} s; the reward function seems to hang"
            )


def _require_some_success(outcomes: Sequence[Outcome]) -> None:
    failures = Counter(outcome.message for outcome in outcomes if outcome.status != "ok")
    if outcomes and failures.total() == len(outcomes):
        message, count = failures.most_common(1)[0]
        raise RewardError(f"every one of {len(outcomes)} samples failed: {message} ({count} times)")


def _kill_all(workers: list[WorkerProcess]) -> None:
    while workers:
        workers.pop().kill()
