"""Panels as plotly figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from plotly import graph_objects as go
from plotly.io import templates

from vexact.report.html.groups import Band, Group
from vexact.report.html.record import Series
from vexact.report.html.thin import kept_points, running_mean, stretch_means
from vexact.report.panels import Panel, step_parts

PALETTE = ("#2a6fbb", "#d9731a", "#2b8a5f", "#b8405e", "#7c5cbf", "#8a6d3b", "#c759a6", "#5b6b7a", "#9aa41f", "#1f9aa8")
_DASHES = ("solid", "dot", "dash", "longdash", "dashdot")
_MOST_POINTS, _POINTS_OF_ALL = 1000, 6000
_MOST_BARS = 120
_FEW = 60  # points that are marked each
_SMOOTH_FROM = 100  # points
_MOST_SEEDS_SHOWN = 10
_STEP = "timing_s/step"
_LAYOUT: dict[str, Any] = {
    "height": 300,
    "margin": {"l": 60, "r": 16, "t": 10, "b": 44},
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#2b2f36"},
    "hovermode": "x unified",
    "hoverlabel": {"namelength": 60},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
}
_NUMBERS: dict[str, Any] = {"exponentformat": "power", "minexponent": 5, "separatethousands": True}  # 40,000; 3×10⁷


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def curves(panel: Panel, names: Sequence[str], groups: Sequence[Group]) -> dict[str, Any]:
    """A line per group and metric: the mean over seeds in its band, the single seeds faint behind it.

    Groups have colours, metrics have dashes; of one group, metrics have colours.
    """
    steps: set[int] = set()
    limit = max(100, min(_MOST_POINTS, _POINTS_OF_ALL // max(1, len(groups) * len(names))))
    figure, shown = go.Figure(), []
    for place, group in enumerate(groups):
        for number, name in enumerate(names):
            band = group.band(name)
            if band is None:
                continue
            steps |= {int(band.steps[0]), int(band.steps[-1])}
            if panel.sums:
                band = _sum_so_far(band)
            style = _Style(
                colour(place if len(groups) > 1 else number),
                _DASHES[number % len(_DASHES)] if len(groups) > 1 else "solid",
                escape(name),
                escape(name if len(groups) == 1 else f"{group.label} · {name}" if len(names) > 1 else group.label),
                in_legend=place == 0 and len(names) > 1,
            )
            seeds = [] if panel.sums or len(group.runs) < 2 else group.series(name)[:_MOST_SEEDS_SHOWN]
            figure.add_traces(list(_traces(panel, band, seeds, style, limit)))
            shown += [band.mean, *(seed.values for seed in seeds)]
    figure.update_layout(
        **_LAYOUT,
        xaxis={"title": {"text": "step"}, **_whole_steps(steps)},
        yaxis={"title": {"text": panel.unit}, "range": _range(panel, shown), **_NUMBERS},
    )
    return _plain(figure)


def _whole_steps(ends: set[int]) -> dict[str, Any]:
    """An axis of few steps has ticks at steps only."""
    first, last = min(ends, default=0), max(ends, default=0)
    if first == last:
        return {"dtick": 1, "range": [first - 0.5, last + 0.5]}
    return {"dtick": 1} if last - first < 8 else {}


class _Style(NamedTuple):
    colour: str
    dash: str
    metric: str
    label: str  # of the pointer
    in_legend: bool


def _traces(panel: Panel, band: Band, seeds: Sequence[Series], style: _Style, limit: int) -> Iterable[go.Scatter]:
    quiet: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False, "legendgroup": style.metric}
    red, green, blue = (int(style.colour[place : place + 2], 16) for place in (1, 3, 5))
    faint = f"rgba({red},{green},{blue},0.28)"
    if band.has_interval:
        kept = np.unique(np.concatenate([kept_points(edge, limit // 2) for edge in (band.low, band.high)]))
        inside = kept[np.isfinite(band.low[kept])]
        line: dict[str, Any] = {"width": 0}
        steps = _numbers(band.steps[inside])
        yield go.Scatter(x=steps, y=_numbers(band.low[inside]), mode="lines", line=line, **quiet)
        fill = {"fill": "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.16)"}
        yield go.Scatter(x=steps, y=_numbers(band.high[inside]), mode="lines", line=line, **fill, **quiet)
    for seed in seeds:
        yield _line(seed.steps, seed.values, limit // 2, {"color": faint, "width": 0.8}, **quiet)
    mean, window = band.mean, len(band.steps) // 50
    if panel.smooth and len(mean) >= _SMOOTH_FROM and window > 1:
        if not seeds:
            yield _line(band.steps, mean, limit, {"color": faint, "width": 1}, **quiet)
        mean = running_mean(mean, window)
    line = {"color": style.colour, "dash": style.dash, "width": 2}
    legend: dict[str, Any] = {"name": style.metric, "showlegend": style.in_legend, "legendgroup": style.metric}
    legend["hovertemplate"] = f"%{{y}}<extra>{style.label}</extra>"
    yield _line(band.steps, mean, limit, line, marks=panel.marks or len(mean) <= _FEW, **legend)


def _line(steps: np.ndarray, values: np.ndarray, limit: int, line: dict[str, Any], **more: Any) -> go.Scatter:
    kept = kept_points(values, limit)
    mode = "lines+markers" if more.pop("marks", False) else "lines"
    x, y = _numbers(steps[kept]), _numbers(values[kept])
    return go.Scatter(x=x, y=y, mode=mode, line=line, marker={"size": 4}, connectgaps=False, **more)


def step_bars(group: Group) -> dict[str, Any] | None:
    """Where the time of a step goes: its parts on top of each other, means over stretches of a long run."""
    bands = {name: group.band(name) for name in step_parts(group.metric_names())}
    parts = {name: band for name, band in bands.items() if band is not None}
    whole = group.band(_STEP)
    steps = np.unique(np.concatenate([np.zeros(0, int), *(band.steps for band in parts.values())]))
    steps = steps[steps > 0]  # a validation before training is no step
    if not len(steps):
        return None
    names = list(parts)
    seconds = np.stack([_at(steps, band) for band in parts.values()])
    if whole is not None:
        names = [*names, "timing_s/other"]
        seconds = np.vstack([seconds, np.maximum(0.0, _at(steps, whole) - seconds.sum(axis=0))])
    first = np.linspace(0, len(steps), min(len(steps), _MOST_BARS) + 1).astype(int)[:-1]
    means = stretch_means(seconds, _MOST_BARS)
    figure = go.Figure()
    for number, (name, values) in enumerate(zip(names, means, strict=True)):
        label = escape(name.removeprefix("timing_s/"))
        bar = {"marker": {"color": colour(number) if label != "other" else "#c9ced6", "line": {"width": 0}}}
        figure.add_bar(x=_numbers(steps[first]), y=_numbers(values), name=label, **bar)
    figure.update_layout(
        **_LAYOUT,
        legend_orientation="v",
        legend_x=1.02,
        legend_y=1,
        legend_yanchor="top",
        barmode="stack",
        bargap=0.05,
        xaxis={"title": {"text": "step"}},
        yaxis={"title": {"text": "seconds"}},
    )
    return _plain(figure)


def _at(steps: np.ndarray, band: Band) -> np.ndarray:
    """Means at ``steps``; 0 where there is none."""
    values = np.zeros(len(steps))
    there = np.isin(band.steps, steps) & np.isfinite(band.mean)
    values[np.searchsorted(steps, band.steps[there])] = band.mean[there]
    return values


def _sum_so_far(band: Band) -> Band:
    mean = np.cumsum(np.nan_to_num(band.mean, nan=0.0))
    nothing = np.full(len(mean), np.nan)
    return Band(band.steps, mean, nothing, nothing)


def _range(panel: Panel, shown: Sequence[np.ndarray]) -> list[float] | None:
    """The curves, not the bands: that of two seeds is many times as wide."""
    values = np.concatenate([part[np.isfinite(part)] for part in shown]) if shown else np.zeros(0)
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if panel.expected is not None or panel.sums:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        return [-0.06, 1.0]
    margin = 0.06 * (high - low) or abs(high) * 0.1
    found = [low - margin, high + margin]
    return found if all(map(math.isfinite, found)) else None


def _numbers(values: np.ndarray) -> list[float | int | None]:
    """For JSON: whole numbers as they are, others with 7 digits, which a screen has no use for more of."""
    return [_number(value) for value in values.tolist()]


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.7g}")


def _plain(figure: go.Figure) -> dict[str, Any]:
    """The figure as JSON-able data, without a template: all figures of a page share one."""
    data: dict[str, Any] = figure.to_plotly_json()
    data["layout"].pop("template", None)
    return data


def template() -> Any:
    """What the figures leave to be said once."""
    return templates["plotly_white"].to_plotly_json()
