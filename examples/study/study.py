"""The study of docs/study.md: run its grid, collect the results, write its tables and figures.

    python examples/study/study.py run --part primary --workers 2
    python examples/study/study.py collect runs/study/results.jsonl --out examples/study/results.parquet
    python examples/study/study.py write examples/study/results.parquet

``run`` may be interrupted, killed and repeated: only runs that are not in ``results.jsonl`` are run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do what is not done of the grid")
    run.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    run.add_argument("--part", action="append", help="of the grid, in this order; all by default")
    run.add_argument("--work", type=Path, default=Path("runs/study"), help="results and unfinished runs")
    run.add_argument("--workers", type=int, default=2, help="processes at a time")
    run.add_argument("--seconds", type=float, help="begin nothing more after so many")
    collect = commands.add_parser(
        "collect", help="make one parquet of results.jsonl files, and of parquets that were made before"
    )
    collect.add_argument("results", type=Path, nargs="+", help="a run that is in several of them counts once")
    collect.add_argument("--out", type=Path, required=True)
    write = commands.add_parser("write", help="write tables and figures into the page")
    write.add_argument("results", type=Path)
    write.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    write.add_argument("--page", type=Path, default=HERE.parents[1] / "docs" / "study.md")
    arguments = parser.parse_args()
    try:
        return {"run": _run, "collect": _collect, "write": _write}[arguments.command](arguments)
    except ValueError as error:
        sys.stderr.write(f"study.py: {error}\n")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    from grid import read_grid
    from runner import run_all

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its runs end with it
    specs = read_grid(arguments.grid, arguments.part)
    failed = run_all(specs, arguments.work.resolve(), arguments.workers, arguments.seconds)
    return 1 if failed else 0


def _collect(arguments: argparse.Namespace) -> int:
    from results import read_results, write_results
    from runner import read_rows

    if absent := [path for path in arguments.results if not path.is_file()]:
        raise ValueError(f"{absent[0]} is no file")
    read = {path: read_results(path) if path.suffix == ".parquet" else read_rows(path) for path in arguments.results}
    write_results([row for rows in read.values() for row in rows], arguments.out)
    for path, rows in read.items():
        sys.stdout.write(f"{path}: {len(rows)} runs\n")
    sys.stdout.write(f"{arguments.out}: {len(read_results(arguments.out))} different runs\n")
    return 0


def _write(arguments: argparse.Namespace) -> int:
    from page import write_page

    write_page(arguments.results, arguments.grid, arguments.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
