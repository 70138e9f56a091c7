"""A step that was launched and whose tokens the host has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vexact.rollout.execution.readback import PendingOutput
from vexact.rollout.sampling.sampler import StepOutput
from vexact.rollout.scheduling.state import SlotState


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """Whose tokens a step brings. A request may leave its slot meanwhile: its token is then nobody's."""

    slots: np.ndarray  # (S,) int64
    tenancy: np.ndarray  # (S,) int64, of these slots when the step was launched
    output: PendingOutput | None  # None: the step samples nothing

    def land(self, state: SlotState) -> tuple[np.ndarray, StepOutput] | None:
        """Waits for the tokens; those of requests that are still there, with their slots. None if there are none."""
        if self.output is None:
            return None
        output, still_there = self.output.wait(), state.tenancy[self.slots] == self.tenancy
        if still_there.all():
            return self.slots, output
        return (self.slots[still_there], output.rows(still_there)) if still_there.any() else None

    def settle(self) -> None:
        """Waits for the step; what it sampled is nobody's."""
        if self.output is not None:
            self.output.wait()
