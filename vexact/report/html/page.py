"""The page: figures and samples as data, tables as markup, one style, two scripts, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from vexact.report.html import tables
from vexact.report.html.browser import sample_pages
from vexact.report.html.groups import Group, grouped, metric_names
from vexact.report.html.record import RunRecord, told_apart
from vexact.report.names import describe
from vexact.report.panels import PARTS, SECTIONS, Panel

FILE_NAME = "report.html"


class MissingPlotlyError(ValueError):
    """The package that draws is not installed."""

    def __init__(self) -> None:
        super().__init__("a report needs the package plotly: pip install 'vexact[report]'")


@dataclass(frozen=True, slots=True)
class Picture:
    """A panel of the page. ``figure`` is the place of its data among all figures; ``verdict`` of an expected value."""

    title: str
    metrics: tuple[tuple[str, str], ...]  # name and meaning
    figure: int
    verdict: str = ""
    mark: str = ""  # of the verdict: good, bad, or nothing where some steps have no value


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    pictures: list[Picture] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def write_report(runs: Sequence[RunRecord], out: str | Path) -> Path:
    """Writes the page of one or more runs; the file appears only once it is complete.

    Raises:
        MissingPlotlyError: plotly is not installed.
        OSError: the file cannot be written.
    """
    path = Path(out).resolve()  # of a link, what it names is replaced
    text = render(runs)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")  # two may write one page
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Path(out)


def render(runs: Sequence[RunRecord]) -> str:
    """The page's markup."""
    try:
        from vexact.report.html import figures
    except ImportError as error:
        raise MissingPlotlyError from error
    groups = grouped(told_apart(runs))
    ordered = [run for group in groups for run in group.runs]
    drawn: list[dict[str, Any]] = []
    sections = [_section(title, panels, groups, drawn) for title, panels in SECTIONS.items()]
    data = {"figures": drawn, "template": figures.template(), "samples": sample_pages(ordered)}
    plotly = resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")
    scripts = {"plotly": plotly.replace("</script", "<\\/script"), "script": _asset("page.js")}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html.j2")).render(
        title=" · ".join(dict.fromkeys(run.name for run in runs)) if len(runs) < 4 else f"{len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        groups=groups,
        colours=[figures.colour(number) for number in range(len(groups))],
        runs=ordered,
        overview_titles=list(tables.OVERVIEW),
        overview=tables.overview(groups),
        problems=[(run.name, problem) for run in ordered for problem in run.problems],
        sections=sections,
        divergences=[(run.name, run.divergence) for run in ordered if run.divergence],
        tables={
            "Certificate": tables.certificates(ordered),
            "Environment": tables.environments(ordered),
            "Configuration": tables.configurations(ordered),
        },
        data=_data(data),
        style=_asset("page.css"),
        hashes=[_hash(text) for text in scripts.values()],
        **scripts,
    )


def _section(title: str, panels: Sequence[Panel], groups: Sequence[Group], drawn: list[dict[str, Any]]) -> Section:
    section, present = Section(title), metric_names(groups)
    for panel in panels:
        names = panel.metrics(present)
        before = len(section.pictures)
        section.pictures.extend(_pictures(panel, names, groups, drawn))
        if len(section.pictures) == before:
            section.absent.append(panel.title)
    return section


def _pictures(
    panel: Panel, names: Sequence[str], groups: Sequence[Group], drawn: list[dict[str, Any]]
) -> Iterable[Picture]:
    from vexact.report.html import figures

    if panel.title == PARTS:
        for group in groups:
            figure = figures.step_bars(group)
            if figure is not None:
                drawn.append(figure)
                title = PARTS if len(groups) == 1 else f"{PARTS}: {group.label}"
                yield Picture(title, _meanings(["timing_s/step"]), len(drawn) - 1)
    elif any(np.isfinite(series.values).any() for group in groups for name in names for series in group.series(name)):
        drawn.append(figures.curves(panel, names, groups))
        yield Picture(panel.title, _meanings(names), len(drawn) - 1, *_verdict(panel, names, groups))


def _meanings(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, describe(name) or "") for name in names)


def _verdict(panel: Panel, names: Sequence[str], groups: Sequence[Group]) -> tuple[str, str]:
    """What is said of the curves and its mark; nothing for a panel whose values no exact run determines."""
    if panel.expected is None:
        return "", ""
    values = np.concatenate([series.values for group in groups for name in names for series in group.series(name)])
    wrong = int((values != panel.expected).sum())  # NaN is
    if wrong:
        return f"not {panel.expected:g} in {wrong} of {len(values)} values", "bad"
    there = steps = 0
    for run in (run for group in groups for run in group.runs):
        measured = {step for name in names if name in run.series for step in run.series[name].steps.tolist()}
        there, steps = there + len(measured), steps + len(measured | run.trained_steps)
    if there < steps:
        return f"{panel.expected:g} in the {there} of {steps} steps that have a value", ""
    return f"{panel.expected:g} in every step, as it has to be", "good"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _data(value: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element or begin markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    """How the page's policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
