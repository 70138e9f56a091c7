"""`starts.jsonl`: a line per start that training went on from, with its first step and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILE_NAME = "starts.jsonl"
_ABSENT = "absent"


class Start(NamedTuple):
    """The configuration that holds from ``first_step`` until the next start."""

    first_step: int
    config: Mapping[str, Any]  # nested, as ``config.yaml``


def read_starts(run_dir: Path) -> list[Start]:
    """In their order; lines that are no start are left out.

    Raises:
        OSError: there is a file that cannot be read.
    """
    try:
        lines = (run_dir / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [start for line in lines if (start := _start(line)) is not None]


def write_starts(run_dir: Path, starts: Sequence[Start]) -> None:
    """Replaces the file in one rename."""
    temporary = run_dir / f".{FILE_NAME}.tmp"
    temporary.write_text("".join(f"{json.dumps(start._asdict())}\n" for start in starts), encoding="utf-8")
    temporary.replace(run_dir / FILE_NAME)


def changed_settings(starts: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, list[tuple[int, Any]]]:
    """Keys whose value is not the same in all starts, each with (first step, value) of every change.

    Args:
        starts: first steps, ascending, and flat configurations.

    >>> changed_settings([(1, {"lr": 1, "n": 4}), (5, {"lr": 2, "n": 4}), (9, {"lr": 2, "n": 4})])
    {'lr': [(1, 1), (5, 2)]}
    """
    keys = dict.fromkeys(key for _, config in starts for key in config)
    found = {}
    for key in keys:
        values: list[tuple[int, Any]] = []
        for first_step, config in starts:
            value = config.get(key, _ABSENT)
            if not values or values[-1][1] != value:
                values.append((first_step, value))
        if len(values) > 1:
            found[key] = values
    return found


def history(values: Sequence[tuple[int, Any]]) -> str:
    """
    >>> history([(1, 0.5), (5, 0.25)])
    '0.5 to step 4, 0.25 from step 5 on'
    """
    ends = [first_step - 1 for first_step, _ in values[1:]]
    earlier = [f"{_text(value)} to step {end}" for (_, value), end in zip(values, ends, strict=False)]
    first_step, value = values[-1]
    return ", ".join([*earlier, f"{_text(value)} from step {first_step} on"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _start(line: str) -> Start | None:
    try:
        given = json.loads(line)
        step, config = given["first_step"], given["config"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    if type(step) is not int or not 1 <= step < 2**53 or not isinstance(config, dict):
        return None
    return Start(step, config)
