"""What graders print, made printable and passed on to the driver's standard error."""

from __future__ import annotations

import codecs
import os
import select

from vexact.reward.text import printable

_MAX_BYTES = 1 << 16  # per grader process; a terminal is no place for more
_PIECE = 1024  # with escapes at most 12 times as long; poll promises room for 4096 only, so pieces are cut again
_ROOM = 4096
_STDERR = 2


class Relay:
    """Reads a pipe that graders write; never blocks, whoever reads standard error."""

    def __init__(self, source: int) -> None:
        os.set_blocking(source, False)
        self._source, self._left = source, _MAX_BYTES
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def pump(self) -> bool:
        """Pass one piece on; False once nobody can write any more."""
        try:
            piece = os.read(self._source, _PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if piece and self._left > 0:
            self._left -= len(piece)
            _show(printable(self._decoder.decode(piece), keep="\n\t"))
            if self._left <= 0:
                _show("\n(what this reward worker prints from here on is dropped)\n")
        return bool(piece)

    def drain(self) -> None:
        """Pass on what is left, after the last writer has ended."""
        while self._left > 0 and select.select([self._source], [], [], 0)[0] and self.pump():
            pass


def _show(text: str) -> None:
    """Write as much as standard error takes at once; a reader that is stuck loses it."""
    data = text.encode("utf-8", "backslashreplace")
    room = select.poll()
    room.register(_STDERR, select.POLLOUT)
    for start in range(0, len(data), _ROOM):
        try:
            if room.poll(100):
                os.write(_STDERR, data[start : start + _ROOM])
        except OSError:
            return
