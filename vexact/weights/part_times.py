"""How long the parts of a transfer took, without waiting for the device in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch


class PartTimes:
    """Seconds by part: of the current stream on CUDA, of the process on CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what runs inside to ``name``."""
        if self._cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._events.append((name, start, stop))
        else:
            started = perf_counter()
            yield
            self._seconds[name] += perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """``timing_s/weights_<part>``; waits until the last part has ended."""
        for name, start, stop in self._events:
            stop.synchronize()
            self._seconds[name] += start.elapsed_time(stop) / 1e3
        self._events.clear()
        return {f"timing_s/weights_{name}": seconds for name, seconds in self._seconds.items()}
