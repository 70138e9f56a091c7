"""``best``: the one line that names the checkpoint with the best value of a metric so far."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from vexact.models.checkpoint.files import sync
from vexact.trainer.checkpoint.pointer import FOLDER

log = logging.getLogger(__name__)
FILE = "best"
VALUES_FILE = "best.json"
_VALIDATION = "val-"  # what the names of metrics begin with that only a validation reports


class BestMetricError(ValueError):
    """``trainer.best_metric`` names no metric of this run."""


class BestPointer:
    """Ranks the checkpoints that exist by the metric of their step; the earlier one of two equals is the best.

    The values lie in ``best.json``, so that a resumed run goes on ranking, and one that is set back to an earlier step
    ranks what it has left. Without a metric nothing is written and none is kept.
    """

    def __init__(self, run_dir: Path, metric: str | None, mode: str = "max") -> None:
        self.metric, self.mode = metric, mode
        self._file, self._values_file = run_dir / FILE, run_dir / VALUES_FILE
        self._values: dict[int, float] | None = None

    def value(self, metrics: Mapping[str, float], validated: bool) -> float | None:
        """Of one step; None where there is no metric to look at, or the step has none of a validation.

        Raises:
            BestMetricError: the step has other metrics of that kind, but not this one.
        """
        if self.metric is None:
            return None
        if self.metric in metrics:
            return float(metrics[self.metric])
        if self.metric.startswith(_VALIDATION) and not validated:
            return None
        known = sorted(metrics)
        near = difflib.get_close_matches(self.metric, known, n=3, cutoff=0.5)
        near = near or [name for name in known if name.startswith(self.metric.split("/")[0])][:3] or known[:3]
        raise BestMetricError(
            f"trainer.best_metric={self.metric}: this run reports no such metric; near names: {', '.join(near)}. The "
            "same command with another trainer.best_metric goes on"
        )

    def note(self, step: int, value: float, steps: Collection[int]) -> None:
        """Ranks ``step`` by ``value``; ``steps`` are those of which there is a checkpoint."""
        if not math.isfinite(value):
            log.warning("step %d has %s=%s and cannot be the best checkpoint", step, self.metric, value)
            return
        self._known(steps)[step] = value
        self._write(steps)

    def refresh(self, steps: Collection[int], coming: int | None = None) -> int | None:
        """Points to the best of ``steps`` and returns it; None where none has a value.

        ``coming`` is the step of a checkpoint on its way, whose value is kept. Others without a checkpoint are dropped.
        """
        values = self._known(steps)
        for step in values.keys() - {*steps, coming}:
            del values[step]
        return self._write(steps)

    def _known(self, steps: Collection[int]) -> dict[int, float]:
        if self._values is None:
            self._values = {step: value for step, value in self._read().items() if step in steps}
        return self._values

    def _read(self) -> dict[int, float]:
        """What was noted for the same metric; a file that cannot be read counts as none."""
        try:
            content = json.loads(self._values_file.read_bytes())
            values = {int(step): float(value) for step, value in content["values"].items()}
            before, now = (content["metric"], content["mode"]), (self.metric, self.mode)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        if before != now and self.metric is not None:
            log.info("%s ranked by %s (%s); ranking starts anew with %s (%s)", self._file, *before, *now)
        return values if before == now else {}

    def _write(self, steps: Collection[int]) -> int | None:
        values = self._known(steps)
        here = [step for step in values if step in steps]
        sign = 1 if self.mode == "max" else -1
        best = max(here, key=lambda step: (sign * values[step], -step), default=None)
        if self.metric is not None and values:
            content = {"metric": self.metric, "mode": self.mode, "values": values}
            _replace(self._values_file, json.dumps(content) + "\n")
        else:
            self._values_file.unlink(missing_ok=True)
        if best is None:
            self._file.unlink(missing_ok=True)
        else:
            _replace(self._file, f"{FOLDER}/step_{best}\n")
        return best


def _replace(file: Path, text: str) -> None:
    """Old or new whatever happens; unchanged where nothing changes."""
    if file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text:
        return
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
    sync(file.parent)
