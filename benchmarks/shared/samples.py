"""Where Python spends its time, by looking at all threads a few hundred times a second."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import FrameType

PERIOD_S = 0.003
IDLE = {"threading.py", "queue.py", "selectors.py", "socket.py", "connection.py"}  # where threads wait for others
CHAIN = 5  # frames of a place


@contextmanager
def sampled() -> Iterator[Counter[str]]:
    """Counts places, ``inner.py:7 f < caller.py:3 …``, of every thread that does something, until the block ends."""
    found: Counter[str] = Counter()
    ended = threading.Event()

    def watch() -> None:
        own = threading.get_ident()
        while not ended.is_set():
            time.sleep(PERIOD_S)
            for thread, frame in sys._current_frames().items():
                if thread != own and PurePath(frame.f_code.co_filename).name not in IDLE:
                    found[_place(frame)] += 1

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def shares(found: Counter[str], most: int) -> dict[str, float]:
    """Of the most frequent places, their share of all samples.

    >>> shares(Counter({"a.py:1 f": 3, "b.py:2 g": 1}), 1)
    {'a.py:1 f': 0.75}
    """
    total = sum(found.values()) or 1
    return {place: round(count / total, 4) for place, count in found.most_common(most)}


def _place(frame: FrameType | None) -> str:
    names = []
    while frame is not None and len(names) < CHAIN:
        file = PurePath(frame.f_code.co_filename).name
        names.append(f"{file}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)
