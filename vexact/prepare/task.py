"""A reasoning-gym task as ``train.parquet`` and ``test.parquet``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

from vexact.data.tasks import PREFIX, is_task, make_task, parse_task
from vexact.prepare.files import write_parquet


def write_task(directory: Path, task: str, seed: int = 0, test_size: int = 100) -> None:
    """Write both splits; the test rows come from a seed far from the training rows'.

    Args:
        task: a task name, or ``reasoning_gym:NAME?size=…&seed=…&setting=…``.
        seed: of the training rows; 0 where ``task`` sets its own.
        test_size: test rows.

    Raises:
        ValueError: unknown task or setting, two seeds, the package is missing, or ``test_size`` is not positive.
    """
    if test_size < 1:
        raise ValueError(f"test_size={test_size} must be at least 1")
    spec = parse_task(task if is_task(task) else PREFIX + task)
    own = dict(parse_qsl(task.partition("?")[2])).get("seed")
    if own is None:
        spec = replace(spec, seed=seed)
    elif seed not in (0, spec.seed):
        raise ValueError(f"the task sets seed={own}, and --seed is {seed}; give one of them")
    # The library draws row i from seed + i, so neighbouring seeds share rows: stay clear of the training rows.
    test = replace(spec, size=test_size, seed=spec.seed + max(spec.size, 1_000_000))
    write_parquet(make_task(spec), directory / "train.parquet", "train")
    write_parquet(make_task(test), directory / "test.parquet", "test")
