"""Sides that take turns: one call after another of each, so that a clock that falls hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TIMED = 2  # calls of a turn, after one that finds the memory


@dataclass(slots=True)
class Side:
    """``call`` computes log-probabilities and leaves gradients, which ``release`` frees."""

    call: Callable[[], Tensor]
    gradients: Callable[[], dict[str, Tensor]]
    release: Callable[[], None]
    form: Callable[[], AbstractContextManager[Any]] = nullcontext
    times: list[float] = field(default_factory=list)

    def first(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor], float]:
        """Results, and the seconds with compilation."""
        started = time.monotonic()
        with self.form():
            logprobs = self.call()
        _wait(device)
        gradients = self.gradients()
        self.release()
        return logprobs, gradients, round(time.monotonic() - started, 1)

    def turn(self, device: torch.device) -> float | None:
        """Adds to ``times``; returns the most memory held, in GiB."""
        if device.type == "cuda":  # what the other side left is of other sizes
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with self.form():
            self.times += [_milliseconds(self, device) for _ in range(TIMED + 1)][1:]
        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None


def _milliseconds(side: Side, device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        side.call()
        stop.record()
        torch.cuda.synchronize(device)
        elapsed = start.elapsed_time(stop)
    else:
        started = time.perf_counter()
        side.call()
        elapsed = 1e3 * (time.perf_counter() - started)
    side.release()
    return elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
