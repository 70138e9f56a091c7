"""The study's pictures, as SVG. Needs matplotlib (``pip install matplotlib``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from analysis import EXACT, UNCORRECTED, Cell, Study, exact_cell
from outcomes import THRESHOLD_WINDOW, running_mean

INK, FAINT = "#222222", "#dddddd"
COLOURS = {"uncorrected": "#cc6622", "tis": "#2266aa", "seq_mis": "#228855", "bypass": "#8844aa"}
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "vexact",
}


def draw_part(study: Study, out: Path) -> None:
    """Per subject, algorithm and learning rate: on the left the exact score's difference from exact runs, with its
    95 % band, on the right the rewards of uncorrected runs over the steps, as running means over a few steps and
    the seeds, with the range of exact runs."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(cell[:3] for cell in study.cells))
    with matplotlib.rc_context(STYLE):
        height = 0.5 + sum(_height(study, group) for group in groups)
        figure, axes = pyplot.subplots(
            len(groups),
            2,
            figsize=(9, height),
            squeeze=False,
            width_ratios=(1, 1),
            height_ratios=[_height(study, group) for group in groups],
            layout="constrained",
        )
        for group, (left, right) in zip(groups, axes, strict=True):
            cells = [cell for cell in study.cells if cell[:3] == group]
            left.set_title(f"{group[0]}, {group[1]}, learning rate {group[2]:g}", loc="left")
            _differences(left, study, cells)
            _rewards(right, study, cells)
        figure.savefig(out, metadata={"Date": None})
        pyplot.close(figure)


def _height(study: Study, group: tuple[str, str, float]) -> float:
    return max(2.0, 0.22 * sum(cell[:3] == group for cell in study.cells))


def _differences(axis: object, study: Study, cells: Sequence[Cell]) -> None:
    """A row per mode and correction."""
    rows = [cell for cell in cells if cell[3] != EXACT]
    axis.axvline(0, color=INK, linewidth=0.8)
    labelled: set[str] = set()
    for place, cell in enumerate(rows):
        effect = study.effect(cell, exact_cell(cell), "exact_score")
        if effect is None:
            continue
        found, colour = effect.wide, COLOURS[cell[4]]
        label = None if cell[4] in labelled else cell[4]
        labelled.add(cell[4])
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=2.5, alpha=0.5)
        axis.plot(found.mean, place, "o", color=colour, markersize=4, label=label)
    axis.set_yticks(range(len(rows)), [cell[3] for cell in rows])
    axis.invert_yaxis()
    axis.set_xlabel("exact score, difference from exact runs of the same seeds")
    axis.legend(frameon=False, loc="best")


def _rewards(axis: object, study: Study, cells: Sequence[Cell]) -> None:
    shown = [cell for cell in cells if cell[4] == UNCORRECTED]
    shades = np.linspace(0.15, 0.9, max(len(shown) - 1, 1))
    from matplotlib import colormaps

    for number, cell in enumerate(shown):
        rewards = np.array([_padded(row["reward"], int(row["steps"])) for row in study.rows[cell].values()])
        smooth = np.array([running_mean(row, THRESHOLD_WINDOW) for row in rewards])
        steps = np.arange(rewards.shape[1] - smooth.shape[1], rewards.shape[1]) + 1
        colour = INK if cell[3] == EXACT else colormaps["plasma"](shades[number - 1])
        axis.plot(
            steps, smooth.mean(0), color=colour, linewidth=1.8 if cell[3] == EXACT else 1.0, label=cell[3], zorder=3
        )
        if cell[3] == EXACT:
            axis.fill_between(steps, smooth.min(0), smooth.max(0), color=INK, alpha=0.12, linewidth=0)
    axis.set_xlabel("step")
    axis.set_ylabel("reward as sampled")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)


def _padded(values: Sequence[float], steps: int) -> np.ndarray:
    """A run that stopped itself has the reward 0 from there on."""
    reward = np.zeros(steps)
    reward[: len(values)] = values
    return reward
