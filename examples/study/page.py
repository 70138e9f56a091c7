"""Writes the study's tables and figures: tables between the markers of docs/study.md, figures beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from analysis import EXACT, UNCORRECTED, Cell, Effect, Study, exact_cell, uncorrected_cell
from bands import Band
from certainty import CONFIRMATION, hypotheses_table, multiplicity_table, rounding_table
from grid import read_grid
from results import read_results

STALE = "one_step_off"
ROUNDINGS, MULTIPLICITY = "rounding", "multiplicity"
BEGIN, END = "<!-- study:{} -->", "<!-- /study:{} -->"


def write_page(results: Path, grid: Path, page: Path) -> None:
    """Replaces what stands between ``<!-- study:NAME -->`` and ``<!-- /study:NAME -->`` for every part of the grid,
    ``NAME-staleness``, ``NAME-weights``, ``confirmation-hypotheses``, ``rounding`` and ``multiplicity``, and draws
    ``study_NAME.svg`` into the folder ``pictures`` beside the page.

    Raises:
        ValueError: a marker without its end.
    """
    from figures import draw_part

    text = page.read_text(encoding="utf-8")
    rows, pictures = read_results(results), page.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    for name, study in studies(rows, grid).items():
        if BEGIN.format(name) not in text or not study.seeds:
            continue
        draw_part(study, pictures / f"study_{name}.svg")
    page.write_text(with_tables(text, rows, grid), encoding="utf-8")


def with_tables(text: str, rows: Sequence[Mapping[str, Any]], grid: Path) -> str:
    """The page with the tables of these results. Raises ValueError for a marker without its end."""
    parts = studies(rows, grid)
    for name, study in parts.items():
        if study.seeds:
            text = _filled(text, name, lambda study=study: part_table(study))
            text = _filled(text, f"{name}-staleness", lambda study=study: staleness_table(study))
            text = _filled(text, f"{name}-weights", lambda study=study: weights_table(study))
    if CONFIRMATION in parts and not parts[CONFIRMATION].missing:
        text = _filled(text, f"{CONFIRMATION}-hypotheses", lambda: hypotheses_table(parts[CONFIRMATION]))
    text = _filled(text, ROUNDINGS, lambda: rounding_table(parts))
    return _filled(text, MULTIPLICITY, lambda: multiplicity_table(parts))


def _filled(text: str, marker: str, table: Callable[[], str]) -> str:
    return replace_between(text, marker, table()) if BEGIN.format(marker) in text else text


def studies(rows: Sequence[Mapping[str, Any]], grid: Path) -> dict[str, Study]:
    """One per part of the grid, of its own seeds alone. Runs that parts share count in each of them."""
    raw = yaml.safe_load(grid.read_text(encoding="utf-8"))
    thresholds = {name: float(subject["threshold"]) for name, subject in raw["subjects"].items()}
    found = {}
    for name in raw["parts"]:
        specs = read_grid(grid, [name])
        ids = {spec.id for spec in specs}
        found[name] = Study([row for row in rows if row["id"] in ids], thresholds, [_cell(spec) for spec in specs])
    return found


def replace_between(text: str, name: str, content: str) -> str:
    """Raises ValueError where the end of a marker is missing."""
    before, begin, rest = text.partition(BEGIN.format(name))
    _, end, after = rest.partition(END.format(name))
    if not end:
        raise ValueError(f"{BEGIN.format(name)} has no {END.format(name)} after it")
    return f"{before}{begin}\n{content}\n{end}{after}"


def part_table(study: Study) -> str:
    """One table per subject, algorithm and learning rate."""
    groups = list(dict.fromkeys(cell[:3] for cell in study.cells))
    return "\n\n".join(_table(study, [cell for cell in study.cells if cell[:3] == group]) for group in groups)


def staleness_table(study: Study) -> str:
    """Uncorrected, one step off against every size of noise."""
    lines = [
        "| learning rate | KL of `one_step_off` | against | its KL | difference of the exact score | |",
        "|---|---|---|---|---|---|",
    ]
    for cell in sorted(study.cells, key=lambda cell: cell[:3]):
        stale = (*cell[:3], STALE, UNCORRECTED)
        if cell[4] == UNCORRECTED and cell[3].startswith("noise") and stale in study.cells:
            kl, other = (_mean(study.band(each, "kl").mean, ".1e") for each in (stale, cell))
            difference = " | ".join(_effect(study.effect(stale, cell, "exact_score")))
            lines.append(f"| {cell[2]:g} | {kl} | `{cell[3]}` | {other} | {difference} |")
    return "\n".join(lines)


def weights_table(study: Study) -> str:
    """What the corrections leave of the samples: means over all steps and seeds."""
    columns = {
        "effective_samples": ".0%",
        "rejected": ".0%",
        "clip_fraction": ".1%",
        "grad_norm": ".2f",
        "entropy": ".2f",
    }
    lines = [
        "| learning rate | mode | correction | effective samples | rejected | clipped | gradient norm | entropy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in study.cells:
        correction = "" if cell[3] == EXACT else f"`{cell[4]}`"
        found = [_mean(_mean_of(study, cell, column), form) for column, form in columns.items()]
        lines.append(f"| {' | '.join([f'{cell[2]:g}', f'`{cell[3]}`', correction, *found])} |")
    return "\n".join(lines)


def _mean_of(study: Study, cell: Cell, column: str) -> float:
    """NaN where no step has such a metric."""
    values = np.array([value for row in study.rows[cell].values() for value in row[column]], dtype=np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _table(study: Study, cells: Sequence[Cell]) -> str:
    subject, algorithm, lr = cells[0][:3]
    lines = [
        f"`{subject}`, {algorithm}, learning rate {lr:g}, {len(study.seeds)} seeds:",
        "",
        "| mode | correction | exact score | difference from `none` | | from `uncorrected` | | final reward | "
        "steps to threshold | collapsed (fallen) | spikes | KL | other bits | other experts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_entries(study, cell))} |" for cell in cells]
    return "\n".join(lines)


def _entries(study: Study, cell: Cell) -> list[str]:
    mode, correction = cell[3:]
    against_exact = None if mode == EXACT else study.effect(cell, exact_cell(cell), "exact_score")
    corrected = None if cell == uncorrected_cell(cell) else study.effect(cell, uncorrected_cell(cell), "exact_score")
    return [
        f"`{mode}`",
        "" if mode == EXACT else f"`{correction}`",
        _interval(study.band(cell, "exact_score")),
        *_effect(against_exact),
        *_effect(corrected),
        _interval(study.band(cell, "final_reward")),
        _interval(study.band(cell, "steps_to_threshold"), ".0f"),
        _collapses(study, cell),
        _interval(study.band(cell, "spikes"), ".1f"),
        _mean(study.band(cell, "kl").mean, ".1e"),
        _mean(study.band(cell, "share_different").mean, ".0%"),
        _mean(study.band(cell, "routes_share_different").mean, ".1%"),
    ]


def _collapses(study: Study, cell: Cell) -> str:
    collapsed, fallen = (int(sum(study.values(cell, outcome).values())) for outcome in ("collapsed", "fallen"))
    return f"{collapsed} of {len(study.seeds)}" + (f" ({fallen})" if collapsed else "")


def _effect(effect: Effect | None) -> list[str]:
    if effect is None:
        return ["", ""]
    verdict = effect.verdict
    return [_interval(effect.wide, "+.3f"), f"**{verdict}**" if verdict == "seen" else verdict]


def _interval(found: Band, form: str = ".3f") -> str:
    if not math.isfinite(found.mean):
        return "–"
    return f"{found.mean:{form}} ({found.low:{form}} … {found.high:{form}})"


def _mean(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "–"
    return "0" if value == 0 else f"{value:{form}}"


def _cell(spec: Any) -> Cell:
    return spec.subject, spec.algorithm, spec.lr, spec.mode, spec.correction
