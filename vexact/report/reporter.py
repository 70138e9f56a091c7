"""One object that the driver tells everything; it passes each thing on to the sinks of ``trainer.logger``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from vexact.report.console import ConsoleSink
from vexact.report.jsonl import JsonlSink
from vexact.report.sink import RunInfo, Sink
from vexact.report.tensorboard import TensorboardSink
from vexact.report.wandb import WandbSink
from vexact.types import StepStats

SINKS: dict[str, Callable[[RunInfo], Sink]] = {
    "console": ConsoleSink,
    "jsonl": JsonlSink,
    "wandb": WandbSink,
    "tensorboard": TensorboardSink,
}


class Reporter:
    """Metrics, plan and progress to all sinks.

    >>> reporter = Reporter(["jsonl"], "runs/demo")                     # doctest: +SKIP
    >>> reporter.log(StepStats(step=1, metrics={"critic/score/mean": 0.5}))  # doctest: +SKIP
    """

    def __init__(
        self,
        loggers: Sequence[str],
        run_dir: str | Path,
        *,
        project: str = "vexact",
        experiment: str = "default",
        config: Mapping[str, Any] | None = None,
        total_steps: int | None = None,
        resume_step: int | None = None,
    ) -> None:
        """Open the sinks.

        Args:
            loggers: names out of ``SINKS``.
            run_dir: the run's directory; made if absent.
            config: the resolved configuration, for sinks that store it.
            total_steps: for the progress bar.
            resume_step: the step of the checkpoint a resumed run goes on from; None starts a new run.

        Raises:
            ValueError: an unknown logger, or one whose package is missing.
        """
        unknown = [name for name in loggers if name not in SINKS]
        if unknown:
            raise ValueError(f"trainer.logger names {unknown[0]!r}, which is unknown; use {', '.join(SINKS)}")
        run = RunInfo(Path(run_dir), project, experiment, dict(config or {}), total_steps, resume_step)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._step = run.first_step
        with ExitStack() as opened:
            self._sinks: list[Sink] = []
            for name in dict.fromkeys(loggers):
                self._sinks.append(SINKS[name](run))
                opened.callback(self._sinks[-1].close)
            self._close = opened.pop_all()

    def plan(self, rows: Sequence[tuple[str, str]], advice: Sequence[str] = ()) -> None:
        """The start-up plan: (name, value) rows, and sentences worth reading."""
        for sink in self._sinks:
            sink.plan(rows, advice)

    def stage(self, name: str) -> None:
        """A stage of the current step begins; give this to ``Timers(on_enter=…)``."""
        for sink in self._sinks:
            sink.stage(self._step, name)

    def log(self, stats: StepStats) -> None:
        """All metrics of one step."""
        for sink in self._sinks:
            sink.step(stats)
        self._step = stats.step + 1

    def close(self) -> None:
        """Flush everything. Idempotent."""
        self._close.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
