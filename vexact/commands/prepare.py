"""`vexact prepare`: make a local model or dataset directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vexact import env


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "prepare",
        help="make a local model or dataset directory",
        description="Make a local model or dataset directory and print where it is.",
    )
    parser.add_argument("name", metavar="NAME", help="tiny, smollm2, random, or a reasoning_gym: task")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (a folder of the cache)")
    parser.add_argument("--arch", metavar="A", help="shape of a random model, e.g. qwen3-1.7b")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights and rows (0)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from vexact.prepare import prepare

    out = arguments.out or Path(env.cache_dir()) / arguments.name.partition("?")[0].replace(":", "_")
    where = prepare(arguments.name, out, arch=arguments.arch, seed=arguments.seed)
    sys.stdout.write(f"{where}\n")
    return 0
