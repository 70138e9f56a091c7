"""A picture of a run for a page of docs: reward and validation above, what the audit found below. `vexact report` shows
more, in a browser.

    python -m benchmarks.trainer.plot_run runs/vexact/smollm2_spell_backward \\
        --out docs/pictures/smollm2_spell_backward.svg

Needs matplotlib (``pip install matplotlib``).
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path

import numpy as np

from benchmarks.shared.options import out_file
from vexact.report.html import RunRecord, read_run
from vexact.report.html.thin import running_mean

INK, BLUE, ORANGE, GREEN = "#222222", "#2266aa", "#cc6622", "#228855"
STYLE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "style.mplstyle"


def series(run: RunRecord, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the steps in which the metric is finite."""
    if name not in run.series:
        return [], []
    steps, values = run.series[name]
    finite = np.isfinite(values)
    return steps[finite].tolist(), values[finite].tolist()


def plot(run: RunRecord, out: Path, title: str) -> None:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"font.size": 9}, STYLE):
        figure, (top, bottom) = pyplot.subplots(
            2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(3, 1), layout="constrained"
        )
        steps, reward = series(run, "critic/score/mean")
        top.plot(steps, reward, color=BLUE, alpha=0.3, linewidth=0.8)
        top.plot(
            steps, running_mean(np.array(reward), 10), color=BLUE, label="reward of a step's samples (and mean of 10)"
        )
        for name in sorted(name for name in run.series if name.startswith("val-core/")):
            top.plot(*series(run, name), "o-", color=ORANGE, markersize=4, linewidth=1, label=name)
        top.set_ylabel("reward")
        top.legend(frameon=False, loc="upper left")
        top.set_title(title, loc="left")
        steps, compared = series(run, "bitwise/tokens_compared")
        _, different = series(run, "bitwise/tokens_different")
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
    parser.add_argument("--out", type=out_file, required=True, help="an .svg or .png file")
    parser.add_argument("--title", help="default: the run's name")
    arguments = parser.parse_args()
    run = read_run(arguments.run)
    if run.last_step is None:
        raise SystemExit(f"{arguments.run} has no steps; give the run directory of a run with trainer.logger=[…,jsonl]")
    plot(run, arguments.out, arguments.title or run.name)
    print(arguments.out)


if __name__ == "__main__":
    main()
