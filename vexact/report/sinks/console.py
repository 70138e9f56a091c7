"""The terminal: the plan, then one aligned row per step, under a progress bar where there is a terminal."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vexact.report.sinks.sink import RunInfo, Sink
from vexact.streams import Lasting
from vexact.types import StepStats

HEADER_EVERY = 20
ETA_STEPS = 20  # the remaining time follows the mean of so many steps
Metrics = dict[str, float]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a step's row; ``metric`` is read from the step's metrics unless ``text`` computes the cell."""

    title: str
    width: int
    metric: str = ""
    form: str = ".3f"
    text: Callable[[Metrics], str] | None = None

    def cell(self, metrics: Metrics) -> str:
        if self.text is not None:
            return self.text(metrics)
        value = metrics.get(self.metric)
        return "-" if value is None else format(value, self.form)


def mismatch(metrics: Metrics) -> str:
    """``0 / 262144``: tokens whose log-prob bits or experts differ, of all compared."""
    compared = metrics.get("bitwise/tokens_compared")
    return f"{_different(metrics):.0f} / {compared:.0f}" if compared else "not compared"


def _different(metrics: Metrics) -> float:
    return max(metrics.get("bitwise/tokens_different", 0), metrics.get("bitwise/routes_different", 0))


COLUMNS = (
    Column("reward", 7, "critic/score/mean"),
    Column("length", 7, "response_length/mean", ".1f"),
    Column("entropy", 8, "actor/entropy"),
    Column("grad norm", 10, "actor/grad_norm"),
    Column("mismatch", 16, text=mismatch),
    Column("gen s", 7, "timing_s/gen", ".2f"),
    Column("train s", 8, "timing_s/update_actor", ".2f"),
    Column("tok/s", 8, "perf/throughput", ".0f"),
    Column("eta", 8),
)


class ConsoleSink(Sink):
    """Rich output on a terminal, plain lines elsewhere; the numbers are the same.

    A console that can no longer be written to (``| head``, a closed terminal, a full disk behind ``>``) is left alone:
    training goes on, and every number is in the other sinks.
    """

    def __init__(self, run: RunInfo, console: Console | None = None) -> None:
        self._console = console or Console(file=cast(TextIO, Lasting(sys.stdout, _say_lost)), highlight=False)
        self._live = self._console.is_terminal
        self._total, self._first = run.total_steps, run.first_step
        self._num_rows = 0
        self._started = monotonic()  # of the first stage, once there is one
        self._ends: deque[float] = deque(maxlen=ETA_STEPS + 1)  # of the latest steps
        self._has_stage = False
        self._told: set[tuple[int, str]] = set()  # step and stage, where no line is overwritten
        self._progress: Progress | None = None

    def plan(self, rows: Sequence[tuple[str, str]], advice: Sequence[str]) -> None:
        if self._live:
            table = Table(show_header=False, title="plan", title_justify="left", title_style="bold")
            table.add_column(style="cyan", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in rows:
                table.add_row(Text(name), Text(value))
            self._console.print(table)
        else:
            width = max((len(name) for name, _ in rows), default=0)
            for name, value in rows:
                self._line(f"{name:<{width}}  {value}")
        for sentence in advice:
            self._line(f"note: {sentence}", "yellow")

    def stage(self, step: int, name: str) -> None:
        """Shown live on a terminal; elsewhere only for the first step, where a slow start could look like a hang."""
        if name == "step":  # the whole, not a part
            return
        if not self._has_stage:
            self._has_stage, self._started = True, monotonic()
        if self._live:
            self._bar().update(self._bar().task_ids[0], description=f"step {step} · {name}")
        elif self._num_rows == 0 and (step, name) not in self._told:  # dynamic sampling comes back to one
            self._told.add((step, name))
            self._line(f"step {step}: {name} ...")

    def step(self, stats: StepStats) -> None:
        validation = {name: value for name, value in stats.metrics.items() if name.startswith("val-core/")}
        if "critic/score/mean" in stats.metrics or not validation:
            self._row(stats)
        for name, value in validation.items():
            self._line(f"step {stats.step}: {name} = {value:.4f}", "bold")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _row(self, stats: StepStats) -> None:
        width = len(str(self._total)) * 2 + 1 if self._total else 6
        width = max(width, len("step"))
        if self._num_rows % HEADER_EVERY == 0:
            titles = "".join(f"{column.title:>{column.width + 1}}" for column in COLUMNS)
            self._line(f"{'step':>{width}}{titles}", "bold")
        self._num_rows += 1
        label = f"{stats.step}/{self._total}" if self._total else str(stats.step)
        row = Text(f"{label:>{width}}")
        for column in COLUMNS:
            cell = self._eta(stats.step) if column.title == "eta" else column.cell(stats.metrics)
            row.append(f" {cell:>{column.width}}", style=_style(column, stats.metrics))
        self._console.print(row, soft_wrap=True)
        if self._live:
            self._bar().update(self._bar().task_ids[0], completed=stats.step - self._first + 1)

    def _eta(self, step: int) -> str:
        if self._total is None:
            return "-"
        self._ends.append(monotonic())
        if len(self._ends) > 1:  # kernels compile in the first step, so it says little about the others
            per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        else:
            per_step = self._ends[0] - self._started
        return str(timedelta(seconds=round(per_step * max(0, self._total - step))))

    def _bar(self) -> Progress:
        if self._progress is None:
            total = None if self._total is None else self._total - self._first + 1
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.add_task("starting", total=total)
            self._progress.start()
        return self._progress

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def _say_lost(error: Exception) -> None:
    log.warning("the console takes no more lines (%s); the run goes on", error)


def _style(column: Column, metrics: Metrics) -> str:
    if column.title != "mismatch" or not metrics.get("bitwise/tokens_compared"):
        return ""
    return "bold red" if _different(metrics) else "green"
