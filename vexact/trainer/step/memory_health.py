"""GPUs whose memory is so nearly full that PyTorch keeps giving back what it caches."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vexact.config import Config
from vexact.config.memory import out_of_memory_advice

log = logging.getLogger(__name__)


class MemoryHealth:
    """Says once that allocations are tried again: nothing fails, and every step is slower.

    Args:
        first: the first step of this process, in which what a step needs is allocated for the first time.
    """

    def __init__(self, config: Config, first: int) -> None:
        self._config, self._first = config, first
        self._has_told = False

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        retries = metrics.get("perf/num_alloc_retries", 0.0)
        if not retries or step <= self._first or self._has_told:
            return
        self._has_told = True
        log.warning(
            "a GPU's memory is nearly full: PyTorch found no room, gave back all memory it cached and tried again %.0f "
            "time(s) in step %d. Each time the GPU stops, so steps may take several times as long "
            "(perf/num_alloc_retries says how it goes on). To need less memory: %s",
            retries,
            step,
            out_of_memory_advice(self._config, "any"),
        )
