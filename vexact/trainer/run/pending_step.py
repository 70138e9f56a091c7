"""The metrics of a step whose checkpoint is saved and whose validation is not done yet."""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = "pending_step.json"


class PendingStep:
    """Written before the checkpoint, removed once the step is reported.

    A run that ends in between has its weights; the next start repeats the validation, which is a function of these
    weights, and reports the step. No row of the metrics is lost or written twice.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / FILE

    def write(self, step: int, metrics: dict[str, float]) -> None:
        temporary = self._file.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"step": step, "metrics": metrics}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._file)

    def metrics(self, step: int) -> dict[str, float] | None:
        """Those of ``step`` if it waits to be reported. A file that cannot be read counts as none."""
        try:
            saved = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(saved["metrics"]) if saved["step"] == step else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        self._file.unlink(missing_ok=True)
