"""One step after another: schedule, launch, and collect the tokens, of the same step or of the one before.

Running ahead, step t + 1 is launched before the host has seen the tokens of step t:

    host     launch t+1 | collect t | launch t+2 | collect t+1 | ...
    device   ... step t ------------| step t+1 ---------------| step t+2 ...

Its rows read these tokens on the device. All else is known: a token that is on its way has its position, its page and
its draw, and a request whose last allowed token is on its way takes no part. What the host cannot foresee is that a
request ends by a stop token or string, or is aborted. Its row of the step that is under way is then thrown away, and
writes one more key and value, into a page that was the request's when the step was launched. Whoever gets that page is
granted it later, and writes to it in a step that the device runs later.
"""

from __future__ import annotations

import time

from vexact.rollout.execution.runner import ModelRunner
from vexact.rollout.requests.request import Request
from vexact.rollout.scheduling.batch import build_batch
from vexact.rollout.scheduling.block_manager import BlockManager
from vexact.rollout.scheduling.scheduler import Schedule, Scheduler
from vexact.rollout.scheduling.state import SlotState
from vexact.rollout.stats import EngineStats
from vexact.rollout.stepping.collector import Collector
from vexact.rollout.stepping.flight import Flight
from vexact.types import Sample


class Stepper:
    """Drives the parts of one engine. Between two calls at most one step is under way."""

    def __init__(
        self,
        state: SlotState,
        blocks: BlockManager,
        scheduler: Scheduler,
        runner: ModelRunner,
        collector: Collector,
        *,
        runs_ahead: bool,
    ) -> None:
        self._state = state
        self._blocks = blocks
        self._scheduler = scheduler
        self._runner = runner
        self._collector = collector
        self.runs_ahead = runs_ahead
        self._flight: Flight | None = None
        self.stats = EngineStats()

    def step(self) -> list[Sample]:
        """Launch a step if there is work for one, collect one; returns the samples that ended. See ``Engine.step``."""
        started = time.perf_counter()
        try:
            return self._step()
        finally:
            self.stats.step_seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Wait for a step that nobody needs any more, so that pages, weights and graphs can be touched."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.settle()

    def _step(self) -> list[Sample]:
        ahead = self.runs_ahead and not self._runner.is_watched
        before = self._flight
        schedule = None
        if before is None or ahead:
            schedule = self._scheduler.schedule(may_preempt=before is None)
        if schedule is None or not schedule.slots.size:  # what comes next depends on the tokens that are on their way
            self._flight = None
            return [] if before is None else self._collect(before)
        launched, filled = self._launch(schedule)
        self.stats.num_ahead += before is not None
        self._flight = launched if ahead else None
        landing = before if ahead else launched
        try:
            return [] if landing is None else self._collect(landing)
        finally:
            self._scheduler.share(filled)

    def _launch(self, schedule: Schedule) -> tuple[Flight, list[Request]]:
        """The step of ``schedule``, and the requests that fill a page with it."""
        self.stats.max_used_pages = max(self.stats.max_used_pages, self._blocks.num_used)
        batch = build_batch(self._state, schedule)
        inputs = self._runner.prepare(batch)
        started = time.perf_counter()
        output = self._runner.execute(inputs)
        self.stats.execute_seconds += time.perf_counter() - started
        self.stats.num_steps += 1
        filled = self._scheduler.commit(schedule, batch.sample_slots)
        slots = batch.sample_slots
        return Flight(slots, batch.sample_positions, self._state.tenancy[slots], output), filled

    def _collect(self, flight: Flight) -> list[Sample]:
        started = time.perf_counter()
        landed = flight.land(self._state)
        waited = time.perf_counter() - started
        self.stats.wait_seconds += waited
        self.stats.execute_seconds += waited
        if landed is None:
            return []
        self.stats.num_tokens += len(landed[0])
        return self._collector.collect(*landed)
