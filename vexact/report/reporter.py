"""One object that the driver tells everything; it passes each thing on to the sinks of ``trainer.logger``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from vexact.report.samples.table import Row
from vexact.report.sinks.console import ConsoleSink
from vexact.report.sinks.jsonl import JsonlSink
from vexact.report.sinks.sink import RunInfo, Sink
from vexact.report.sinks.tensorboard import TensorboardSink
from vexact.report.sinks.wandb import WandbSink
from vexact.types import StepStats

log = logging.getLogger(__name__)
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
            OSError: ``metrics.jsonl`` cannot be written.
        """
        unknown = [name for name in loggers if name not in SINKS]
        if unknown:
            raise ValueError(f"trainer.logger names {unknown[0]!r}, which is unknown; use {', '.join(SINKS)}")
        run = RunInfo(Path(run_dir), project, experiment, dict(config or {}), total_steps, resume_step)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._step = run.first_step
        self._sinks: dict[str, Sink] = {}
        self._lost: set[str] = set()
        with ExitStack() as opened:
            for name in dict.fromkeys(loggers):
                self._open(name, run)
                opened.callback(self._close, name)
            self._closing = opened.pop_all()

    def plan(self, rows: Sequence[tuple[str, str]], advice: Sequence[str] = ()) -> None:
        """The start-up plan: (name, value) rows, and sentences worth reading."""
        self._tell(lambda sink: sink.plan(rows, advice))

    def begin(self, step: int) -> None:
        """What comes belongs to this step, until its metrics are logged."""
        self._step = step

    def stage(self, name: str) -> None:
        """A stage of the current step begins; give this to ``Timers(on_enter=…)``."""
        self._tell(lambda sink: sink.stage(self._step, name))

    def log(self, stats: StepStats) -> None:
        """All metrics of one step."""
        self._tell(lambda sink: sink.step(stats))
        self._step = stats.step + 1

    def samples(self, step: int, stem: str, rows: Sequence[Row]) -> None:
        """A few samples of a step (``stem`` "step") or a validation ("val"), as ``sample_rows`` gives them."""
        self._tell(lambda sink: sink.samples(step, stem, rows))

    def page(self, path: Path) -> None:
        """The run's HTML page is written."""
        self._tell(lambda sink: sink.page(path, max(0, self._step - 1)))

    def say_lost(self, what: str, error: OSError) -> None:
        """One line for the first file of its kind that cannot be written."""
        if what not in self._lost:
            self._lost.add(what)
            log.error("%s of step %d cannot be written, training goes on: %s", what, self._step, error)

    def close(self) -> None:
        """Flush everything. Idempotent."""
        self._closing.close()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str, run: RunInfo) -> None:
        """A dashboard that does not open is left out; what the user has to fix, and the run's own record, are not."""
        try:
            self._sinks[name] = SINKS[name](run)
        except ValueError:
            raise
        except Exception as error:
            if name == "jsonl":
                raise
            _say_lost(name, "at the start", error)

    def _tell(self, what: Callable[[Sink], None]) -> None:
        """Tells every sink. One that fails hears nothing more, and training goes on."""
        for name, sink in list(self._sinks.items()):
            try:
                what(sink)
            except Exception as error:
                _say_lost(name, f"at step {self._step}", error)
                with suppress(Exception):  # it has failed already
                    self._sinks.pop(name).close()

    def _close(self, name: str) -> None:
        sink = self._sinks.pop(name, None)
        try:
            if sink is not None:
                sink.close()
        except Exception as error:
            _say_lost(name, "when it was closed", error)


def _say_lost(name: str, when: str, error: Exception) -> None:
    """One line of an error that may have many."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    log.error("trainer.logger: %s failed %s and gets nothing more, training goes on: %s", name, when, text)
