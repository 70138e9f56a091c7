"""A device that is as late as a device may be, and an auditor of what its steps write."""

from __future__ import annotations

from collections import deque

import numpy as np

from vexact.rollout.stepping import stepper


class LateDevice:
    """Runs what an engine launches in order, and nothing before the host waits for it: until then no token exists.

    The page cache of what was launched is that of the moment when it runs, as on a GPU.
    """

    def __init__(self, engine):
        self._run = engine._runner.execute
        self._queue = deque()
        engine._runner.execute = self._launch

    @property
    def num_waiting(self):
        """Steps that nobody has waited for."""
        return len(self._queue)

    def _launch(self, inputs):
        launch = _Launch(self, inputs)
        self._queue.append(launch)
        return launch if inputs.num_sampled else None

    def catch_up(self, launch):
        while launch.output is None:
            earlier = self._queue.popleft()
            earlier.output = self._run(earlier.inputs) or True


class _Launch:
    def __init__(self, device, inputs):
        self.device, self.inputs, self.output = device, inputs, None

    def wait(self):
        self.device.catch_up(self)
        return self.output.wait()


class PageAuditor:
    """When a step is launched, it writes to pages of its own requests alone, which nobody else can find or hold."""

    def __init__(self, engine, monkeypatch):
        self._blocks = engine._blocks
        self._build = stepper.build_batch
        self.num_writes = 0
        monkeypatch.setattr(stepper, "build_batch", self._audited)

    def _audited(self, state, schedule):
        batch = self._build(state, schedule)
        pages = np.split(batch.slot_mapping // state.page_size, np.cumsum(schedule.num_new)[:-1])
        for slot, written in zip(schedule.slots.tolist(), pages, strict=True):
            for page in set(written.tolist()):
                assert page in state.request(slot).pages, f"page {page} is not slot {slot}'s"
                assert self._blocks._refs[page] == 1, f"page {page} is written for slot {slot}, and somebody shares it"
                assert self._blocks._entries[page] is None, f"page {page} is written again after it was shared"
                self.num_writes += 1
        return batch
