"""Programs that stand for others in tests of shell scripts."""

from pathlib import Path


def executable(path: Path, text: str) -> Path:
    """A bash script at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path
