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
    positions: np.ndarray  # (S,) int64, of the tokens in their sequences
    tenancy: np.ndarray  # (S,) int64, of the slots when the step was launched
    output: PendingOutput | None  # None: the step samples nothing

    def land(self, state: SlotState) -> tuple[np.ndarray, StepOutput] | None:
        """Waits for the tokens; those of requests that are still there, with their slots. None if there are none.

        Raises RuntimeError if they are not the next ones of their requests, since waiting for others was interrupted.
        """
        if self.output is None:
            return None
        output, slots = self.output.wait(), self.slots
        still_there = state.tenancy[slots] == self.tenancy
        if ((state.num_known(slots) != self.positions) & still_there).any():
            raise RuntimeError("a step was interrupted and its tokens are lost: abort the requests and add them again")
        if still_there.all():
            return slots, output
        return (slots[still_there], output.rows(still_there)) if still_there.any() else None

    def settle(self) -> None:
        """Waits for the step; what it sampled is nobody's."""
        if self.output is not None:
            self.output.wait()
