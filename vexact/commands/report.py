"""`vexact report`: one HTML file of one or more runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vexact.commands.output import OutputError, check_output

EPILOG = """\
examples:
  vexact report runs/vexact/tiny_arithmetic
  vexact report runs/vexact/seed_* runs/vexact/other_lr --out compared.html
  vexact report --wandb_view my-team/vexact

docs/reports.md says what is in it, docs/dashboards.md what W&B and TensorBoard show.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="show runs in one HTML file",
        description="Write one HTML file that shows a run, or several side by side, and opens without a network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory of a run, done or not")
    parser.add_argument(
        "--out", metavar="FILE", help="default: report.html in the run's directory, or here if there are several"
    )
    parser.add_argument(
        "--wandb_view", metavar="ENTITY/PROJECT", help="instead, give a W&B project a view with the same pictures"
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.wandb_view is not None:
        if arguments.runs or arguments.out is not None:
            raise ValueError("--wandb_view takes no runs and no --out: a view shows all runs of the project")
        from vexact.report.sinks.wandb_view import save_view

        sys.stdout.write(f"{save_view(arguments.wandb_view)}\n")
        return 0
    if not arguments.runs:
        raise ValueError("give the directory of a run, such as runs/vexact/tiny_arithmetic")
    from vexact.report.html import FILE_NAME, read_run, write_report

    found = [read_run(run) for run in arguments.runs]
    runs = list({run.path.resolve(): run for run in found}.values())
    default = runs[0].path / FILE_NAME if len(runs) == 1 else Path(FILE_NAME)
    out = Path(arguments.out) if arguments.out is not None else default
    check_output("--out", out, b"vexact</title>", "report")
    try:
        written = write_report(runs, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror}); name another file with --out") from error
    sys.stdout.write(f"{written}\n")
    return 0
