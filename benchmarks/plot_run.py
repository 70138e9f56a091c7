"""A picture of a run from its metrics.jsonl: reward and validation above, what the audit found below.

    python benchmarks/plot_run.py runs/vexact/smollm2_spell_backward --out docs/smollm2_spell_backward.svg

Needs matplotlib (``pip install matplotlib``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

INK, FAINT, BLUE, ORANGE, GREEN = "#222222", "#dddddd", "#2266aa", "#cc6622", "#228855"
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
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "vexact",
}


def read_rows(run: Path) -> list[dict]:
    """Rows of a run directory, in order of their step. Raises SystemExit when there are none."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if not rows:
        raise SystemExit(f"{file} has no rows; give the run directory of a run with trainer.logger=[…,jsonl]")
    return sorted(rows, key=lambda row: row["step"])


def series(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have the metric."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last ``window`` values, fewer at the start.

    >>> smooth([0.0, 1.0, 2.0], 2)
    [0.0, 0.5, 1.5]
    """
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def plot(rows: Sequence[dict], out: Path, title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, (top, bottom) = pyplot.subplots(
            2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(3, 1), layout="constrained"
        )
        steps, reward = series(rows, "critic/score/mean")
        top.plot(steps, reward, color=BLUE, alpha=0.3, linewidth=0.8)
        top.plot(steps, smooth(reward, 10), color=BLUE, label="reward of a step's samples (and mean of 10)")
        for name in sorted({name for row in rows for name in row if name.startswith("val-core/")}):
            top.plot(*series(rows, name), "o-", color=ORANGE, markersize=4, linewidth=1, label=name)
        top.set_ylabel("reward")
        top.legend(frameon=False, loc="upper left")
        top.set_title(title, loc="left")
        steps, compared = series(rows, "bitwise/tokens_compared")
        _, different = series(rows, "bitwise/tokens_different")
        totals = f"log-probabilities compared: {sum(compared):,.0f}", f"of these different: {sum(different):,.0f}"
        bottom.plot(steps, list(accumulate(compared)), color=GREEN, label=totals[0])
        bottom.plot(steps, list(accumulate(different)), color=INK, label=totals[1])
        bottom.set_xlabel("step")
        bottom.set_ylim(bottom=0)
        bottom.legend(frameon=False, loc="upper left")
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="an .svg or .png file")
    parser.add_argument("--title", help="default: the run's name")
    arguments = parser.parse_args()
    plot(read_rows(arguments.run), arguments.out, arguments.title or arguments.run.name)
    print(arguments.out)


if __name__ == "__main__":
    main()
