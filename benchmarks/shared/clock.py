"""The time of calls on a GPU, and what such times depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import date
from statistics import median
from typing import Any

import torch
import triton


def median_ms(calls: list[Callable[[], object]], target_ms: float = 4.0, replays: int = 5) -> float:
    """Median time of one call: ``calls`` are captured in a graph, one after another, and the graph is replayed."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    graph.replay()
    for _ in range(replays):
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
        if sum(times) * len(calls) > target_ms * 20 and len(times) >= 3:
            break
    return median(times)


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Length of the union.

    >>> covered([(0, 2), (5, 6), (1, 3)])
    4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def environment() -> dict[str, str | None]:
    """What a result depends on beside the code."""
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def machine() -> dict[str, Any]:
    """The same for whole runs, which transformers and several GPUs may be part of."""
    import transformers

    return {
        "gpu": environment()["gpu"],
        "gpus": torch.cuda.device_count(),
        "versions": {module.__name__: module.__version__ for module in (torch, triton, transformers)},
        "date": date.today().isoformat(),
    }
