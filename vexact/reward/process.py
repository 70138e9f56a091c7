"""A handle on one worker process: start, what it is grading, end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from vexact import env
from vexact.reward.channel import DriverEnd, ScoreMessage
from vexact.reward.outcome import Outcome, ProtocolError, checked_failure, checked_score
from vexact.reward.sandbox import tree
from vexact.reward.spec import GradeRequest, RewardSpec
from vexact.reward.text import printable

# A plain interpreter, not multiprocessing: that would import the driver's main module, and torch with it.
_BOOT = (
    "import json, sys; o = json.loads(sys.argv[1]); sys.path[:] = o['path']; "
    "from vexact.reward.sandbox.policy import SandboxPolicy; from vexact.reward.sandbox.warden import main; "
    "main(*o['start'], SandboxPolicy(**o['policy']))"
)
_CLOSED_S = 1.0  # a grader that lives on for so long has closed its connection itself
_END_S = 6.0  # a warden needs milliseconds, and gives up on what cannot be killed after 5 s


class WorkerProcess:
    """One grader process under its warden. ``pending`` holds the indices it has not answered, in its order."""

    def __init__(self, spec: RewardSpec, timeout_s: float, start_timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        self.channel = DriverEnd(ours)
        lifeline, self._lifeline = os.pipe()
        options = {
            "path": sys.path,
            "start": [theirs.fileno(), lifeline, os.getpid()],
            "policy": asdict(spec.sandbox),
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(options)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lifeline],
                start_new_session=True,  # Ctrl-C goes to the driver alone
                env=env.grader_environment(spec.sandbox.env),
            )
        except OSError:
            os.close(self._lifeline)
            self.channel.close()
            raise
        finally:
            theirs.close()
            os.close(lifeline)
        self.pending: deque[int] = deque()
        self.lacking: dict[str, str] = {}  # protections this machine does not give
        self.is_ready = False
        self.has_started = False  # imported the graders of the batch it was given
        self.num_graded = 0
        self._token = ""
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self.deadline = time.monotonic() + start_timeout_s
        with suppress(OSError):  # a process that died at once is noticed as a closed connection
            self.channel.send(spec)

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.pending

    def assign(self, batch: list[tuple[int, GradeRequest]]) -> None:
        """Send a batch; the clock starts when the worker says that its graders are imported."""
        self.pending.extend(index for index, _ in batch)
        self.has_started = False
        self.deadline = time.monotonic() + self._start_timeout_s
        self._token = secrets.token_hex(8)
        with suppress(OSError):
            self.channel.send((self._token, batch))

    def answers(self) -> Iterator[tuple[int, Outcome]]:
        """Read once; what was graded, in order, up to the first thing that is wrong. Other messages change the state.

        Raises:
            EOFError: the process is gone.
            ProtocolError: it sent something that is not an answer to what it was asked.
            LoadError: it could not load the reward function.
        """
        for message in self.channel.receive():
            if isinstance(message, ScoreMessage):
                token, index, value, extra, seconds = message
                outcome = checked_score(value, extra, seconds)
                self._finish(token, index)
                yield index, outcome
                continue
            match message:
                case ["failure", str(token), int(index), *fields]:
                    outcome = checked_failure(fields)
                    self._finish(token, index)
                    yield index, outcome
                case _:
                    self._note(message)
        if self.has_started:
            self.deadline = time.monotonic() + self._timeout_s

    def _finish(self, token: str, index: int) -> None:
        if not self.has_started or token != self._token or not self.pending or index != self.pending[0]:
            raise ProtocolError("it is not what was asked for")
        self.pending.popleft()
        self.num_graded += 1

    def _note(self, message: list[Any]) -> None:
        match message:
            case ["hello", dict() as lacking] if not self.is_ready:
                self.lacking = {printable(key)[:80]: printable(str(why))[:200] for key, why in lacking.items()}
            case ["ready"] if not self.is_ready:
                self.is_ready = True
            case ["failed", str(reason)] if not self.is_ready:
                raise LoadError(printable(reason))
            case ["start", self._token] if self.pending and not self.has_started:
                self.has_started = True
            case _:
                raise ProtocolError("it is not what was asked for")

    def release(self) -> None:
        """Tell the warden to end everything; ``kill`` waits until it has. Idempotent."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
            self.channel.close()

    def kill(self) -> None:
        """End the process and everything it started."""
        self.release()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            tree.kill_all(tree.descendants(self.process.pid))
            self.process.kill()
            self.process.wait()

    def exit_reason(self) -> str:
        """How the process ended, once its connection has closed."""
        code = self._exit_code()
        if code is None:
            return "closed its connection"
        if code == -signal.SIGKILL:
            return "was ended by SIGKILL (the system does that when memory runs out)"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _exit_code(self) -> int | None:
        """Of the warden, which ends as its grader did; None if the grader lives on."""
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=_CLOSED_S)
            if tree.has_living(self.process.pid):
                return None
        return None


class LoadError(Exception):
    """A worker could not load the reward function."""
