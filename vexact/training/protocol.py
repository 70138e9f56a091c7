"""What is trained, as the loop sees it: one actor, or shards of one that look like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from vexact.training.batches.ledger import Ledger
from vexact.training.config import ActorConfig
from vexact.training.passes.forward import Scored
from vexact.training.passes.redraw import Redraw
from vexact.types import TrainSequence

Audit = Callable[[list[int], list[np.ndarray], list[np.ndarray] | None], None]


class Policy(Protocol):
    """``Actor`` says what the methods do."""

    @property
    def config(self) -> ActorConfig: ...

    @property
    def problems(self) -> list[str]:
        """Of the last update: why steps were skipped, what is no longer finite."""
        ...

    def update(
        self,
        sequences: Sequence[TrainSequence],
        audit: Audit | None = None,
        *,
        ledger: Ledger | None = None,
        redraw: Redraw | None = None,
        every_token: bool = False,
    ) -> dict[str, float]: ...

    def logprobs(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> list[np.ndarray]: ...

    def rescore(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> Scored: ...


class Scorer(Protocol):
    """A frozen policy: ``Reference``, or shards of one."""

    def logprobs(self, sequences: Sequence[TrainSequence]) -> list[np.ndarray]: ...
