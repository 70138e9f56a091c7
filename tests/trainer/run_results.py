"""What a run leaves behind, to be compared with what another left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vexact.trainer.checkpoint import load_checkpoint


def digest(run_dir: Path, step: int) -> str:
    """SHA-256 of every weight and moment of a checkpoint, by name."""
    _, state = load_checkpoint(run_dir / "checkpoints" / f"step_{step}")
    sha = hashlib.sha256(str(state["num_updates"]).encode())
    for name, saved in sorted(state["parameters"].items()):
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            sha.update(f"{name} {key} {saved['num_steps']}".encode() + saved[key].numpy().tobytes())
    return sha.hexdigest()


def samples(run_dir: Path, steps: int) -> list[dict]:
    """Of steps 1 to ``steps``."""
    files = [run_dir / "samples" / f"step_{step}.jsonl" for step in range(1, steps + 1)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def rows(run_dir: Path) -> list[dict]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
