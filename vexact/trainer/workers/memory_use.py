"""How much memory is in use, for a step's metrics."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


class MemoryUse:
    """Of this machine, and of this process's GPU where it uses one."""

    def __init__(self) -> None:
        self._retries = _retries()

    def metrics(self) -> dict[str, float]:
        """``perf/…_gb`` in GiB, and ``perf/num_alloc_retries`` since the last call."""
        metrics = {}
        used = _used_bytes()
        if used is not None:
            metrics["perf/cpu_memory_used_gb"] = used / 2**30
        if torch.cuda.is_initialized():
            metrics["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 2**30
            metrics["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 2**30
            before, self._retries = self._retries, _retries()
            metrics["perf/num_alloc_retries"] = float(self._retries - before)
        return metrics


def _retries() -> int:
    """How often since its start this process freed what PyTorch's allocator caches, to try an allocation again."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.memory_stats()["num_alloc_retries"])


def _used_bytes() -> int | None:
    """None where the kernel does not say."""
    try:
        sizes = dict(re.findall(r"(\w+):\s+(\d+) kB", _MEMINFO.read_text()))
        return (int(sizes["MemTotal"]) - int(sizes["MemAvailable"])) * 1024
    except (OSError, KeyError):
        return None
