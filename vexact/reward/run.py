"""One round of grading: hand out batches, read answers, enforce deadlines."""

from __future__ import annotations

import selectors
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vexact import interrupt
from vexact.reward.outcome import Outcome, ProtocolError
from vexact.reward.process import LoadError, WorkerProcess
from vexact.reward.spec import GradeRequest, RewardError

if TYPE_CHECKING:
    from vexact.reward.pool import RewardPool

START_TIMEOUT_S = 120.0  # for starting a worker, loading the user's function and importing graders
_MAX_BATCH = 32
_MIN_TIMEOUTS_TO_GIVE_UP = 16
_TIMEOUTS_TRIED_AGAIN = 4  # per worker and round: each costs the whole deadline once more


class Run:
    """The progress of one ``score`` call: what waits, what is with a worker, what is done.

    A sample that fails with its process, by crash, garbage or deadline, in a process that graded others before, may be
    the victim of one of them: it is tried once more, first in a process of its own, and only that counts.
    """

    def __init__(self, pool: RewardPool, requests: Sequence[GradeRequest]) -> None:
        self._pool, self._requests = pool, requests
        self._waiting = deque(range(len(requests)))
        self._suspects: deque[int] = deque()  # failed once, to be tried in a fresh process
        self._tried_again: set[int] = set()
        self._timeouts_left = _TIMEOUTS_TRIED_AGAIN * pool.num_workers
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
        for worker in [worker for worker in self._pool.workers if worker.is_idle]:
            self._assign(worker)
        readable = self._wait()
        for worker in readable:
            self._read(worker)
        now = time.monotonic()
        for worker in [each for each in self._pool.workers if each not in readable and not each.is_idle]:
            if now >= worker.deadline:
                self._expire(worker)

    def _assign(self, worker: WorkerProcess) -> None:
        if self._suspects and worker.num_graded == 0:
            batch = [self._suspects.popleft()]
        elif self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
        elif self._suspects:
            self._pool.replace(worker)
            return
        else:
            return
        worker.assign([(index, self._requests[index]) for index in batch])

    def _wait(self) -> list[WorkerProcess]:
        """Workers with something to read, or to write, which is written here, before the next deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in self._pool.workers:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.channel.has_unsent else 0)
                selector.register(worker.channel, events, worker)
            deadlines = [worker.deadline for worker in self._pool.workers if not worker.is_idle]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            ready = selector.select(timeout)
        for key, events in ready:
            if events & selectors.EVENT_WRITE:
                with suppress(OSError):  # noticed at the next read
                    key.data.channel.flush()
        return [key.data for key, events in ready if events & selectors.EVENT_READ]

    def _read(self, worker: WorkerProcess) -> None:
        try:
            for index, outcome in worker.answers():
                self._finish(index, outcome)
        except EOFError:
            self._lost(worker)
        except ProtocolError as error:
            self._fail(worker, "garbage", f"the grader wrote to its connection with the driver: {error}")
        except LoadError as error:
            if not self._pool.had_a_worker:
                raise RewardError(str(error)) from None
            self._pool.restart(worker, f"could not load the reward function: {error}")
        if worker.is_ready:
            self._pool.note_ready(worker)

    def _expire(self, worker: WorkerProcess) -> None:
        if not worker.has_started:
            what = "importing the graders" if worker.is_ready else "loading the reward function"
            message = f"spent more than {START_TIMEOUT_S:.0f} s on {what}"
            if not worker.is_ready and not self._pool.had_a_worker:
                raise RewardError(f"a reward worker {message}")
            self._give_back(worker)
            self._pool.restart(worker, message)
            return
        limit = self._pool.timeout_s
        message = f"the grader took longer than reward.timeout_s={limit:g} s and was killed"
        self._charge(worker, Outcome("timeout", kind="timeout", message=message, seconds=limit))
        self._give_up_if_hopeless()

    def _lost(self, worker: WorkerProcess) -> None:
        reason = worker.exit_reason()
        if not worker.is_ready:
            self._pool.restart(worker, f"{reason} before it was ready")
        else:
            self._fail(worker, "crash", f"the grader process {reason} while grading")

    def _fail(self, worker: WorkerProcess, kind: str, message: str) -> None:
        if worker.pending:
            self._charge(worker, Outcome("error", kind=kind, message=message))
        elif worker.is_ready:
            self._pool.replace(worker)
        else:
            self._pool.restart(worker, message)

    def _charge(self, worker: WorkerProcess, outcome: Outcome) -> None:
        """The sample in hand pays, unless others may have caused it."""
        victim = worker.pending.popleft()
        if self._may_be_innocent(victim, worker, outcome):
            self._tried_again.add(victim)
            self._suspects.append(victim)
        else:
            self._finish(victim, outcome)
        self._give_back(worker)
        self._pool.replace(worker)

    def _finish(self, index: int, outcome: Outcome) -> None:
        """The answer to request ``index``, as the channel has proven by token and place."""
        self._done[index] = outcome._replace(key=self._requests[index].key)

    def _may_be_innocent(self, victim: int, worker: WorkerProcess, outcome: Outcome) -> bool:
        if victim in self._tried_again or worker.num_graded == 0:
            return False
        if outcome.status == "timeout":
            self._timeouts_left -= 1
            return self._timeouts_left >= 0
        return True

    def _give_back(self, worker: WorkerProcess) -> None:
        """What was queued in a worker goes back to the front of the line."""
        for index in reversed(worker.pending):
            (self._suspects if index in self._tried_again else self._waiting).appendleft(index)
        worker.pending.clear()

    def _give_up_if_hopeless(self) -> None:
        """Do not wait ``timeout_s`` for each of thousands of samples when none comes back."""
        needed = max(_MIN_TIMEOUTS_TO_GIVE_UP, 4 * self._pool.num_workers)
        if len(self._done) >= needed and all(outcome.status == "timeout" for outcome in self._done.values()):
            raise RewardError(
                f"the first {len(self._done)} of {len(self._requests)} samples all ran longer than "
                f"reward.timeout_s={self._pool.timeout_s:g} s; the reward function seems to hang"
            )
