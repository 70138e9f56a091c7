"""`vexact prepare`: make a local model or dataset directory."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vexact.config.checks.seed import check_seed


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "prepare",
        help="make a local model or dataset directory",
        description="Make a local model or dataset directory and print where it is.",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="tiny, tiny_moe, tiny_moonlight, smollm2, random, or reasoning_gym:TASK?size=2000&seed=1",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further options of NAME, e.g. test_size=200")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: a folder of the cache)")
    parser.add_argument("--arch", metavar="A", help="shape of a random model, e.g. qwen3-1.7b")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights and rows (0)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    from vexact.prepare import prepare

    check_seed("--seed", arguments.seed)
    options = dict(_option(text) for text in arguments.overrides)
    where = prepare(arguments.name, arguments.out, arch=arguments.arch, seed=arguments.seed, **options)
    sys.stdout.write(f"{where}\n")
    return 0


def _option(text: str) -> tuple[str, Any]:
    """``test_size=200`` to ("test_size", 200); what is not JSON is text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier() or key in ("name", "out_dir", "arch", "seed"):
        raise ValueError(f"{text!r} is not an option; write key=value, and --out, --arch and --seed with their dashes")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
