"""What the ranks log, on rank 0's console: lines of others with their rank, and what all of them say once."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vexact.distributed.lines import Lines

log = logging.getLogger(__name__)


class ToRank0(logging.Handler):
    """On another rank: hands (level, text) of every record to ``send``."""

    def __init__(self, send: Callable[[tuple[int, str]], None]) -> None:
        super().__init__()
        self._send_record = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send_record((record.levelno, self.format(record)))


class OfAllRanks:
    """On rank 0: relays what others say, and drops from its own records what another has just said."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._is_new)

    def relay(self, rank: int, level: int, text: str) -> None:
        if self._lines.is_new(text, f"rank {rank}"):
            log.log(level, "[rank %d] %s", rank, text)

    def close(self) -> None:
        for handler in self._handlers:
            handler.removeFilter(self._is_new)

    def _is_new(self, record: logging.LogRecord) -> bool:
        return self._lines.is_new(record.getMessage(), "rank 0")
