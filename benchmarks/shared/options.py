"""Values of the scripts' options: what a script cannot do is said before it begins, in one line with exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn


def out_file(text: str) -> Path:
    """A file that can be written when all is measured."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory; name a file in it, such as {path / 'figures.json'}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file elsewhere")
    return path


def checkpoint(text: str) -> Path:
    """The directory of a Hugging Face checkpoint."""
    path = Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkpoint: there is no {path / 'config.json'}")
    return path


def program(text: str) -> str:
    """What can be run, by its path or by its name on PATH."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no program that can be run")
    return found


def at_least_one(text: str) -> int:
    """Of what there must be one at least."""
    return _whole(text, 1)


def none_or_more(text: str) -> int:
    """Of what there may be none."""
    return _whole(text, 0)


def per_second(text: str) -> float:
    """Per second; ``inf`` is all at once."""
    return _positive(text, math.inf)


def part(text: str) -> float:
    """Of a whole."""
    return _positive(text, 1.0)


def needs_gpu(parser: argparse.ArgumentParser) -> None:
    """Ends the script where torch sees no GPU."""
    if not has_gpu():
        parser.error("torch sees no GPU here, and this script measures one")


def refuse(message: str) -> NoReturn:
    """Ends the script as argparse does."""
    sys.stderr.write(f"{message}\n")
    raise SystemExit(2)


def has_gpu() -> bool:
    """Whether torch, which this imports, sees one."""
    import torch

    return torch.cuda.is_available()


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} must be at least {least}")
    return value


def _positive(text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None
    if not 0 < value <= most:
        raise argparse.ArgumentTypeError(
            f"{text} must be more than 0" + (f" and at most {most:g}" if most < math.inf else "")
        )
    return value
