"""What a reader needs to repeat a run: resolved configuration, versions, commit, device."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from vexact.config import Config


def write_run_record(config: Config, environment: Mapping[str, object]) -> None:
    """Writes ``config.yaml`` and ``environment.json`` into the run directory."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    record = dict(environment) | {"commit": _commit()}
    (config.run_dir / "environment.json").write_text(json.dumps(record, indent=2) + "\n")


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
