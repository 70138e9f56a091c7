"""``progress.json``: where a run stands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vexact.trainer.checkpoint.error import CheckpointError

FILE = "progress.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; data order and sampling are pure functions of it."""

    step: int
    data_cursor: int


def write_progress(directory: Path, progress: Progress) -> None:
    (directory / FILE).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")


def read_progress(directory: Path) -> Progress:
    """Raises CheckpointError: the file is missing or holds something else."""
    file = directory / FILE
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    names = Progress.__dataclass_fields__.keys()
    if not isinstance(content, dict) or content.keys() != names or not all(map(is_count, content.values())):
        raise CheckpointError(f"{file} holds {content!r:.80}; expected whole numbers {' and '.join(names)}")
    return Progress(**content)


def is_count(value: Any) -> bool:
    """Whether it is a whole number that something can be counted with."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
