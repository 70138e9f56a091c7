"""Standard streams whose reader may go away (``| head``, a closed terminal), or that are closed from the start."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO


def prepare() -> None:
    """Makes both streams writable whatever happens to be in a text: one that is closed discards everything."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def reader_gone() -> bool:
    """Whether one of the streams is a pipe that nobody reads any more."""
    return any(_is_broken(stream) for stream in (sys.stdout, sys.stderr))


def flush() -> bool:
    """Whether all that was written has reached its reader; what has not is dropped, so that the exit is quiet."""
    flushed = [_flush(stream) for stream in (sys.stdout, sys.stderr)]  # both, whatever becomes of the first
    return all(flushed)


def _is_broken(stream: TextIO) -> bool:
    poll = select.poll()
    try:
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # no file behind it, or closed
        return False
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def _flush(stream: TextIO) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        _discard(stream)
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Sends the stream, and what is still in its buffer, nowhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # no file behind it, or closed
        return


class Lasting:
    """A text stream that discards what it is given from the first failed write on, and says so once."""

    def __init__(self, stream: TextIO, on_loss: Callable[[Exception], None]) -> None:
        self._stream, self._on_loss, self._is_lost = stream, on_loss, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._is_lost:
            return
        try:
            action()
        except OSError as error:
            self._is_lost = True
            _discard(self._stream)
            self._on_loss(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
