"""A process for work that may hang or die, such as a kernel whose barrier never opens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

Answer = dict[str, Any]


class Worker:
    """Answers jobs one after another in a process of its own, by what `make`, a module's function or class, returns
    there. A job that raises, hangs or kills the process has an answer with the key "error", and the next job gets a new
    process."""

    def __init__(self, make: Callable[[], Callable[[Any], Answer]], limit_s: float = 45.0) -> None:
        self.make, self.limit_s = make, limit_s
        self.process: Any = None

    def ask(self, job: object) -> Answer:
        """The answer, or {"error": why there is none} after limit_s seconds at most; the time to start not counted."""
        try:
            if self.process is None:
                self._start()
            self.connection.send(job)
            if self.connection.poll(self.limit_s):
                found: Answer = self.connection.recv()
            else:
                found = {"error": f"no answer in {self.limit_s:g} s: it hangs"}
        except (EOFError, OSError):
            found = {"error": "its process died"}
        if "error" in found:
            self.stop()
        return found

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.make), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()


def _serve(connection: Connection, make: Callable[[], Callable[[Any], Answer]]) -> None:
    answer = make()
    with suppress(EOFError):
        connection.send("ready")
        while True:
            job = connection.recv()
            try:
                found = answer(job)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"[:300]}
            connection.send(found)
