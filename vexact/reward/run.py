"""One round of grading: hand out batches, read answers, enforce deadlines."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vexact import interrupt
from vexact.reward.process import WorkerProcess
from vexact.reward.spec import GradeRequest, Outcome, RewardError

if TYPE_CHECKING:
    from vexact.reward.pool import RewardPool

START_TIMEOUT_S = 120.0  # for starting a worker, loading the user's function and importing graders
_MAX_BATCH = 32
_MIN_TIMEOUTS_TO_GIVE_UP = 16


class Run:
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
        interrupt.check()
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
            raise RewardError(f"a reward worker spent more than {START_TIMEOUT_S:.0f} s on {what}")
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
