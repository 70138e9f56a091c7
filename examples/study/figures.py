"""The study's pictures, as SVG. Needs matplotlib (``pip install matplotlib``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from analysis import EXACT, UNCORRECTED, Cell, Study, exact_cell
from outcomes import THRESHOLD_WINDOW, running_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#222222"
COLOURS = {"uncorrected": "#cc6622", "tis": "#2266aa", "seq_mis": "#228855", "bypass": "#8844aa"}
LINES = {
    "none": (INK, "-"),
    "noise_0.03": ("#c6b7e2", "-"),
    "noise_0.1": ("#a58ad6", "-"),
    "noise_0.3": ("#8458c4", "-"),
    "noise_1": ("#6326a8", "-"),
    "noise_2": ("#35005f", "-"),
    "bf16_logits": ("#2a9d5c", "--"),
    "k_order": ("#3d8fd1", ":"),
    "softmax_blocks": ("#c9a100", "--"),
    "stock": ("#0f8f8f", "--"),
    "one_step_off": ("#d1352b", "-."),
}
"""Noise in shades of one colour, rounding broken, staleness dashed and dotted."""
GAP = 0.5  # between the bands of two modes, in bands
STYLE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "style.mplstyle"


def draw_part(study: Study, out: Path) -> None:
    """Per subject, algorithm and learning rate: on the left the exact score's difference from exact runs, with its
    95 % band, the dot filled where an effect is seen; on the right the rewards of uncorrected runs over the steps, as
    running means over a few steps and the seeds, with the range of exact runs."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys(cell[:3] for cell in study.cells))
    heights = [_height(study, group) for group in groups]
    with matplotlib.rc_context({"font.size": 8}, STYLE):
        figure, axes = pyplot.subplots(
            len(groups),
            2,
            figsize=(9.5, 0.4 + sum(heights)),
            squeeze=False,
            width_ratios=(1, 1),
            height_ratios=heights,
            layout="constrained",
        )
        for group, (left, right) in zip(groups, axes, strict=True):
            cells = [cell for cell in study.cells if cell[:3] == group]
            left.set_title(f"{group[0]}, {group[1]}, learning rate {group[2]:g}", loc="left")
            right.set_title("uncorrected", loc="left")
            _differences(left, study, cells)
            _rewards(right, study, cells)
        _explain(figure, [correction for correction in COLOURS if any(cell[4] == correction for cell in study.cells)])
        figure.savefig(out, metadata={"Date": None})
        pyplot.close(figure)


def _height(study: Study, group: tuple[str, str, float]) -> float:
    """In inches, of a row of panels: both the bands and the names of the modes need room."""
    cells = [cell for cell in study.cells if cell[:3] == group]
    modes = len({cell[3] for cell in cells})
    return 0.8 + max(0.17 * len(cells), 0.155 * modes, 0.8)


def _differences(axis: Axes, study: Study, cells: Sequence[Cell]) -> None:
    """A row per mode, in it one band per correction."""
    modes = list(dict.fromkeys(cell[3] for cell in cells if cell[3] != EXACT))
    axis.axvline(0, color=INK, linewidth=0.8)
    place, middles = 0.0, []
    for mode in modes:
        rows = [cell for cell in cells if cell[3] == mode]
        middles.append(place + (len(rows) - 1) / 2)
        for cell in rows:
            effect = study.effect(cell, exact_cell(cell), "exact_score")
            if effect is not None:
                colour, found = COLOURS[cell[4]], effect.wide
                axis.plot([found.low, found.high], [place, place], color=colour, linewidth=2.5, alpha=0.5)
                fill = colour if effect.verdict == "seen" else "white"
                axis.plot(found.mean, place, "o", color=colour, markersize=4.5, markerfacecolor=fill)
            place += 1
        place += GAP
    axis.set_yticks(middles, modes)
    axis.set_ylim(place - GAP - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel("exact score, difference from exact runs of the same seeds")


def _explain(figure: Figure, corrections: Sequence[str]) -> None:
    """One legend for all panels on the left, below them."""
    from matplotlib.lines import Line2D

    dot = {"marker": "o", "markersize": 4.5, "linewidth": 2.5}
    handles = [Line2D([], [], color=COLOURS[name], label=name, **dot) for name in corrections]
    handles += [
        Line2D([], [], color="#666666", markerfacecolor=fill, label=label, **{**dot, "linewidth": 0})
        for fill, label in (("#666666", "effect seen"), ("white", "not seen"))
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)


def _rewards(axis: Axes, study: Study, cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell[4] != UNCORRECTED:
            continue
        rewards = np.array([_padded(row["reward"], int(row["steps"])) for row in study.rows[cell].values()])
        smooth = np.array([running_mean(row, THRESHOLD_WINDOW) for row in rewards])
        steps = np.arange(rewards.shape[1] - smooth.shape[1], rewards.shape[1]) + 1
        exact = cell[3] == EXACT
        colour, line = LINES[cell[3]]
        width = 1.8 if exact else 1.1
        axis.plot(steps, smooth.mean(0), line, color=colour, linewidth=width, label=cell[3], zorder=2 if exact else 3)
        if exact:
            axis.fill_between(steps, smooth.min(0), smooth.max(0), color=INK, alpha=0.12, linewidth=0)
    axis.set_xlabel("step")
    axis.set_ylabel("reward as sampled")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=7.5, handlelength=2.6)


def _padded(values: Sequence[float], steps: int) -> np.ndarray:
    """A run that stopped itself has the reward 0 from there on."""
    reward = np.zeros(steps)
    reward[: len(values)] = values
    return reward
