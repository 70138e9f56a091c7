"""What several ranks say at about the same time is said once."""

from __future__ import annotations

import threading
import time

REPEAT_S = 10.0  # a line that another rank has said within this time is not said again


class Lines:
    """Who said which line first, of late; for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, str]] = {}

    def is_new(self, line: str, who: str) -> bool:
        """Whether nobody else has just said it."""
        now = time.monotonic()
        with self._lock:
            self._said = {text: said for text, said in self._said.items() if now - said[0] < REPEAT_S}
            return self._said.setdefault(line, (now, who))[1] == who
