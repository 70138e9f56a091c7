"""How much memory is in use, for a step's metrics."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def memory_metrics() -> dict[str, float]:
    """``perf/…_gb`` in GiB: of this machine, and of this process's GPU where it uses one."""
    metrics = {}
    used = _used_bytes()
    if used is not None:
        metrics["perf/cpu_memory_used_gb"] = used / 2**30
    if torch.cuda.is_initialized():
        metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
        metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
    return metrics


def _used_bytes() -> int | None:
    """None where the kernel does not say."""
    try:
        sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", _MEMINFO.read_text()))
        return (int(sizes["MemTotal"]) - int(sizes["MemAvailable"])) * 1024
    except (OSError, KeyError):
        return None
