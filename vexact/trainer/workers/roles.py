"""Which ranks train and which generate."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.config import Config
from vexact.config.memory.placement import require_trainers


@dataclass(frozen=True, slots=True)
class Roles:
    """Colocated: every rank does both. Disaggregated: the first ranks train, the others generate."""

    world_size: int
    trainers: range
    rollouts: range

    @property
    def colocated(self) -> bool:
        return self.trainers == self.rollouts

    def describe(self) -> str:
        """As the plan says it."""
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        if self.colocated:
            return f"{ranks}, each trains and generates"
        return f"{ranks}: {_span(self.trainers)} train, {_span(self.rollouts)} generate"


def roles_of(config: Config, world_size: int) -> Roles:
    """
    Raises:
        ConfigError: ``trainer.rollout_gpus`` leaves no rank to train.
    """
    apart = config.trainer.rollout_gpus
    everyone = range(world_size)
    if apart is None:
        return Roles(world_size, everyone, everyone)
    require_trainers(apart, world_size)
    return Roles(world_size, everyone[:-apart], everyone[-apart:])


def _span(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
