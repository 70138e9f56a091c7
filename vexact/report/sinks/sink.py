"""What a place for metrics has to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vexact.report.samples.table import Row
from vexact.types import StepStats


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What every sink needs to know about the run."""

    run_dir: Path
    project: str = "vexact"
    experiment: str = "default"
    config: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    resume_step: int | None = None  # the last step that a resumed run keeps; None starts anew

    @property
    def first_step(self) -> int:
        return (self.resume_step or 0) + 1


class Sink:
    """A sink overrides what it has a use for."""

    def plan(self, rows: Sequence[tuple[str, str]], advice: Sequence[str]) -> None:
        """The start-up plan."""

    def stage(self, step: int, name: str) -> None:
        """A stage of a step begins."""

    def step(self, stats: StepStats) -> None:
        """A step is complete."""

    def samples(self, step: int, stem: str, rows: Sequence[Row]) -> None:
        """A few samples of a step ("step") or a validation ("val")."""

    def page(self, path: Path, step: int) -> None:
        """The run's HTML page is written; ``step`` is the last one in it."""

    def close(self) -> None:
        """Flush and release; called once, also after a failure."""


class MissingPackageError(ValueError):
    """A sink was asked for whose package is not installed."""

    def __init__(self, logger: str, package: str) -> None:
        super().__init__(
            f"trainer.logger names {logger!r}, but the package {package} is not installed: "
            f"pip install 'vexact[{logger}]', or leave {logger} out of trainer.logger"
        )
