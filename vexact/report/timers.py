"""Wall-clock seconds per stage, as ``timing_s/*``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Timers:
    """Times named stages of a step; a stage entered twice adds up.

    >>> timers = Timers()
    >>> with timers("gen"):
    ...     pass
    >>> list(timers.take())
    ['timing_s/gen']
    """

    def __init__(self, on_enter: Callable[[str], None] | None = None) -> None:
        """``on_enter`` hears the name of every stage that begins."""
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_enter is not None:
            self._on_enter(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds what other timers took."""
        for key, value in seconds.items():
            name = key.removeprefix("timing_s/")
            self._seconds[name] = self._seconds.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """``timing_s/<name>`` of all stages since the last call."""
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}
