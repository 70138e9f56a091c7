"""TensorBoard event files in ``<run>/tensorboard``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vexact.report.panels import present_panels
from vexact.report.samples.table import COLUMNS, Row
from vexact.report.sinks.jsonl import FILE_NAME, read_metrics
from vexact.report.sinks.sink import MissingPackageError, RunInfo, Sink
from vexact.types import StepStats

_MARKUP = re.compile(r"[^\w\s]", re.ASCII)


class TensorboardSink(Sink):
    """A scalar per metric, the report's pictures as custom scalars, tables of samples as text.

    A resumed run hides the steps that it repeats.
    """

    def __init__(self, run: RunInfo) -> None:
        """Raises MissingPackageError without the package tensorboard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError("tensorboard", "tensorboard") from error
        purge = None if run.resume_step is None else run.first_step
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=purge)
        self._seen = set() if run.resume_step is None else _metrics_before(run.run_dir / FILE_NAME)

    def step(self, stats: StepStats) -> None:
        if new := stats.metrics.keys() - self._seen:
            self._seen |= new
            self._writer.add_custom_scalars(_layout(self._seen))  # the last one counts
        for name, value in stats.metrics.items():
            self._writer.add_scalar(name, value, stats.step)
        self._writer.flush()

    def samples(self, step: int, stem: str, rows: Sequence[Row]) -> None:
        self._writer.add_text(f"samples/{stem}", _markdown(rows), step)

    def close(self) -> None:
        self._writer.close()


def _metrics_before(file: Path) -> set[str]:
    """What the run wrote before it was resumed, as far as its records can be read."""
    try:
        return {name for record in read_metrics(file) for name in record}
    except (OSError, ValueError):
        return set()


def _layout(names: set[str]) -> dict[str, dict[str, list[object]]]:
    """Category -> chart -> its kind and the tags in it, as patterns of their whole names."""
    return {
        section: {title: ["Multiline", [f"{re.escape(name)}$" for name in shown]] for title, shown in panels.items()}
        for section, panels in present_panels(names).items()
    }


def _markdown(rows: Sequence[Row]) -> str:
    """A table. Model text is text: every sign in it that could be markup is a character reference."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = text.replace("\r\n", "\n").splitlines() or [""]
    return " ⏎ ".join(_MARKUP.sub(lambda found: f"&#{ord(found[0])};", line) for line in lines)
