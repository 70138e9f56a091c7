"""One step after another: schedule, run the model, collect."""

from __future__ import annotations

import time

from vexact.rollout.execution.runner import ModelRunner
from vexact.rollout.scheduling.batch import build_batch
from vexact.rollout.scheduling.block_manager import BlockManager
from vexact.rollout.scheduling.scheduler import Scheduler
from vexact.rollout.scheduling.state import SlotState
from vexact.rollout.stats import EngineStats
from vexact.rollout.stepping.collector import Collector
from vexact.types import Sample


class Stepper:
    """Drives the parts of one engine."""

    def __init__(
        self,
        state: SlotState,
        blocks: BlockManager,
        scheduler: Scheduler,
        runner: ModelRunner,
        collector: Collector,
    ) -> None:
        self._state = state
        self._blocks = blocks
        self._scheduler = scheduler
        self._runner = runner
        self._collector = collector
        self.stats = EngineStats()

    def step(self) -> list[Sample]:
        """Schedule, run one forward pass, sample; returns the samples that ended. See ``Engine.step``."""
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        if not schedule.slots.size:
            return []
        self.stats.max_used_pages = max(self.stats.max_used_pages, self._blocks.num_used)
        batch = build_batch(self._state, schedule)
        inputs = self._runner.prepare(batch)
        execute_started = time.perf_counter()
        output = self._runner.execute(inputs)
        execute_seconds = time.perf_counter() - execute_started
        self._scheduler.commit(schedule)
        samples = self._collector.collect(batch.sample_slots, output) if output is not None else []
        seconds = time.perf_counter() - started
        self.stats.record(num_tokens=len(batch.sample_slots), step_seconds=seconds, execute_seconds=execute_seconds)
        return samples
