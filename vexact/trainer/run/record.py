"""What a reader needs to repeat a run: resolved configuration, versions, commit, device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import vexact
from vexact.config import Config
from vexact.report.starts import FILE_NAME as STARTS_FILE
from vexact.report.starts import Start, read_starts, write_starts

SOURCE = Path(vexact.__file__).resolve().parents[1]
"""The source tree that this package runs from, where it is not an installed wheel."""


def write_run_record(
    config: Config, environment: Mapping[str, object], first_step: int = 1, earlier: Mapping[str, object] | None = None
) -> None:
    """Writes ``config.yaml``, ``environment.json`` and ``starts.jsonl`` into the run directory.

    Args:
        first_step: that this start trains; starts that made no step before it are forgotten.
        earlier: the configuration of the step before, for a run directory that has no word of its start.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    starts = [start for start in read_starts(config.run_dir) if start.first_step < first_step]
    if not starts and earlier:
        starts = [Start(1, earlier)]
    now = json.loads(json.dumps(config.to_dict(), default=str))
    write_starts(config.run_dir, [*starts, Start(first_step, now)])
    since = f"# since step {first_step}; the steps before it have theirs in {STARTS_FILE}\n" if starts else ""
    (config.run_dir / "config.yaml").write_text(since + config.to_yaml(), encoding="utf-8")
    record = dict(environment) | {"commit": source_commit()}
    (config.run_dir / "environment.json").write_text(json.dumps(record, indent=2) + "\n")


def source_commit(root: Path = SOURCE) -> str | None:
    """The commit of the source tree ``root``, with ``-dirty`` where files differ from it; None for an installed wheel,
    and where git is not there or does not answer."""
    if not (root / ".git").exists():
        return None
    place = ["-C", str(root), "--git-dir", str(root / ".git"), "--work-tree", str(root)]
    command = ["git", "--no-optional-locks", *place, "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
