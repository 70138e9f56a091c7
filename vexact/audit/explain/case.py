"""What the stages of the finder look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vexact.audit.compare import TokenDifference
from vexact.audit.explain.divergence import Divergence
from vexact.audit.explain.rollout_side import CachedPage, RolloutReplay
from vexact.audit.explain.trainer_side import Trainer, TrainerReplay
from vexact.rollout import Engine, SamplingParams
from vexact.types import Sample


@dataclass(slots=True, eq=False)
class Case:
    """One request, both sides, and what was recorded of them."""

    engine: Engine
    trainer: Trainer
    sample: Sample
    params: SamplingParams | None
    observed: TokenDifference | None  # what the audit saw
    pages: list[CachedPage]
    rollout: RolloutReplay
    packed: TrainerReplay
    rows: dict[str, Tensor] = field(default_factory=dict)  # of the unequal token, by side

    def divergence(self, stage: str, summary: str, position: int | None = None, **more: Any) -> Divergence:
        first_row = len(self.sample.prompt_token_ids) - 1
        response = None if position is None or position < first_row else position - first_row
        return Divergence(stage, summary, self.sample.request_id, position=position, response_position=response, **more)
