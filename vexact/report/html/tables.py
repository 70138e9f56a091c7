"""Runs as rows: what became of each, its certificate, machine and configuration, and where they differ."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vexact.report.html.groups import Group, differing
from vexact.report.html.record import RunRecord

_CERTIFIED = {  # what a certificate says, without the environment that has a table of its own
    "exact": "rollout and trainer agree",
    "comparison.tokens_compared": "log-probabilities compared",
    "comparison.tokens_different": "of these different",
    "comparison.max_ulp": "largest distance (units in the last place)",
    "comparison.max_abs_logprob_diff": "largest difference (nats)",
    "comparison.routes.compared": "tokens whose experts were compared",
    "comparison.routes.different": "of these different",
    "draws.redrawn": "draws repeated",
    "draws.different": "of these different",
    "rollout_attention": "attention of the rollout",
    "trainer_attention": "attention of the trainer",
    "dtype": "data type",
    "weights_version": "weights version",
    "tile_table": "hash of the kernels' constants",
    "seconds": "seconds it took",
}


class Cell(NamedTuple):
    """One value; ``mark`` is good, bad, differs, or nothing."""

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    head: str
    cells: tuple[Cell, ...]
    hint: str = ""

    @property
    def differs(self) -> bool:
        return any(cell.mark == "differs" for cell in self.cells)


def overview(groups: Sequence[Group]) -> list[tuple[int, Row]]:
    """(number of the group, the run's row) of every run, under ``OVERVIEW``."""
    return [
        (number, Row(run.name, tuple(make(run) for make in OVERVIEW.values()), str(run.path)))
        for number, group in enumerate(groups)
        for run in group.runs
    ]


def certificates(runs: Sequence[RunRecord]) -> list[Row]:
    """One row per thing certified; none where no run has a certificate."""
    rows = _rows({key: key for key in _CERTIFIED}, [run.certificate for run in runs])
    named = [Row(_CERTIFIED[row.head], row.cells, row.head) for row in rows]
    if named and named[0].hint == "exact":
        verdicts = [_verdict(run.certificate.get("exact")) for run in runs]
        named[0] = Row(named[0].head, tuple(verdicts), "exact")
    return named


def environments(runs: Sequence[RunRecord]) -> list[Row]:
    tables = [run.environment for run in runs]
    return _rows(dict.fromkeys(key for table in tables for key in table), tables)


def configurations(runs: Sequence[RunRecord]) -> list[Row]:
    tables = [run.settings for run in runs]
    return _rows(dict.fromkeys(key for table in tables for key in table), tables)


def _rows(keys: Iterable[str], tables: Sequence[Mapping[str, Any]]) -> list[Row]:
    apart = set(differing(tables))
    rows = []
    for key in keys:
        if any(key in table for table in tables):
            mark = "differs" if key in apart else ""
            rows.append(Row(key, tuple(Cell(_text(table.get(key, _ABSENT)), mark) for table in tables)))
    return rows


_ABSENT = object()


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, default=str, ensure_ascii=False)


def _verdict(exact: Any) -> Cell:
    if exact is True:
        return Cell("yes, bit for bit", "good")
    return Cell("no", "bad") if exact is False else Cell("no certificate")


def _values(run: RunRecord, name: str) -> np.ndarray:
    values = run.series[name].values if name in run.series else np.zeros(0)
    return values[np.isfinite(values)]


def _progress(run: RunRecord) -> Cell:
    if run.last_step is None:
        return Cell("none yet", "bad")
    if run.total_steps is None:
        return Cell(str(run.last_step))
    if run.trained_steps and run.last_step not in run.trained_steps:
        return Cell(f"stopped in step {run.last_step} of {run.total_steps}", "bad")
    if run.last_step >= run.total_steps:
        return Cell(f"{run.last_step} of {run.total_steps}", "good")
    return Cell(f"{run.last_step} of {run.total_steps}: stopped early, or still running", "bad")


def _last_written(run: RunRecord) -> Cell:
    try:
        return Cell("" if run.last_time is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.last_time)))
    except (ValueError, OverflowError, OSError):
        return Cell("")


def _reward(run: RunRecord) -> Cell:
    values = _values(run, "critic/score/mean")
    return Cell(f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) else "")


def _validation(run: RunRecord) -> Cell:
    names = sorted(name for name in run.series if name.startswith("val-core/") and len(_values(run, name)))
    ends = [(_values(run, name)[0], _values(run, name)[-1]) for name in names[:3]]
    return Cell("; ".join(f"{first:.3f} → {last:.3f}" for first, last in ends))


def _mismatch(run: RunRecord) -> Cell:
    compared = _values(run, "bitwise/tokens_compared").sum()
    if not compared:
        return Cell("not compared", "bad")
    wrong = max(_values(run, f"bitwise/{what}_different").sum() for what in ("tokens", "routes"))
    there, steps = run.series["bitwise/tokens_compared"].steps, run.trained_steps
    scope = f" in {len(there)} of {len(steps | set(there.tolist()))} steps" if steps - set(there.tolist()) else ""
    return Cell(f"{wrong:,.0f} / {compared:,.0f}{scope}", "bad" if wrong else "" if scope else "good")


def _draws(run: RunRecord) -> Cell:
    repeated = _values(run, "bitwise/tokens_redrawn").sum()
    wrong = _values(run, "bitwise/tokens_redrawn_different").sum()
    return Cell(f"{wrong:,.0f} / {repeated:,.0f}", "bad" if wrong else "good") if repeated else Cell("not repeated")


def _certificate(run: RunRecord) -> Cell:
    return _verdict(run.certificate.get("exact"))


def _median(name: str, form: str) -> Callable[[RunRecord], Cell]:
    def cell(run: RunRecord) -> Cell:
        values = _values(run, name)
        return Cell(format(float(np.median(values)), form) if len(values) else "")

    return cell


OVERVIEW: dict[str, Callable[[RunRecord], Cell]] = {
    "steps": _progress,
    "last written": _last_written,
    "reward": _reward,
    "validation": _validation,
    "log-probabilities different / compared": _mismatch,
    "draws different / repeated": _draws,
    "certificate": _certificate,
    "s / step": _median("perf/time_per_step", ".2f"),
    "tokens / s / GPU": _median("perf/throughput", ",.0f"),
}
