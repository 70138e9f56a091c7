"""A handle on one worker process: start, what it is grading, end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

from vexact.reward.channel import Channel
from vexact.reward.spec import GradeRequest, RewardSpec

# A plain interpreter, not multiprocessing: that would import the driver's main module, and torch with it.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from vexact.reward.worker import main; main(int(sys.argv[1]))"
)


class WorkerProcess:
    """One grader process. ``pending`` holds the indices it was given and has not answered, in its order."""

    def __init__(self, spec: RewardSpec, timeout_s: float, start_timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the driver alone; a kill reaches the grader's children
                env=environment,
            )
        self.channel = Channel(ours)
        self.pending: deque[int] = deque()
        self.is_ready = False
        self.has_started = False  # imported the graders of the batch it was given
        self.num_graded = 0
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self.deadline = time.monotonic() + start_timeout_s
        with suppress(OSError):  # a process that died at once is noticed as a closed connection
            self.channel.send((spec, timeout_s))

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.pending

    def assign(self, batch: list[tuple[int, GradeRequest]]) -> None:
        """Send a batch; the clock starts when the worker says that its graders are imported."""
        self.pending.extend(index for index, _ in batch)
        self.has_started = False
        self.deadline = time.monotonic() + self._start_timeout_s
        with suppress(OSError):
            self.channel.send(batch)

    def restart_clock(self) -> None:
        self.deadline = time.monotonic() + self._timeout_s

    def finish(self, index: int) -> None:
        expected = self.pending.popleft()
        assert expected == index, f"worker answered {index}, expected {expected}"
        self.num_graded += 1
        self.restart_clock()

    def kill(self) -> int:
        """End the process and everything it started; returns its exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.channel.close()
        return self.process.wait()

    def exit_reason(self) -> str:
        """How the process ended, once its connection has closed."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=1.0)
            return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return "closed its connection"
