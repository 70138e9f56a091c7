"""``metrics.jsonl``: one JSON object per step, which a resumed run continues."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

from vexact.report.sinks.sink import RunInfo, Sink
from vexact.types import StepStats

log = logging.getLogger(__name__)
FILE_NAME = "metrics.jsonl"


class JsonlSink(Sink):
    """Appends ``{"step", "time", metric: value, …}``; a value that is not finite is written as null.

    What a full disk takes no more of is kept, and written with the next step that it has room for: this is the run's
    own record.
    """

    def __init__(self, run: RunInfo) -> None:
        """Open the file: a resumed run drops the lines after its step, a new run renames an older file."""
        path = run.run_dir / FILE_NAME
        if path.exists():
            if run.resume_step is None:
                path.rename(_free_name(path))
            else:
                _keep_until(path, run.resume_step)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = bytearray()
        self._is_late = False

    def step(self, stats: StepStats) -> None:
        record: dict[str, float | None] = {"step": stats.step, "time": round(time.time(), 3)}
        record |= {name: _finite(value) for name, value in stats.metrics.items()}
        self._unwritten += f"{json.dumps(record, allow_nan=False)}\n".encode()
        try:
            self._write()
        except OSError as error:
            if not self._is_late:
                log.error("%s takes no more, training goes on and tries again at every step: %s", self._path, error)
            self._is_late = True

    def close(self) -> None:
        """Raises OSError if something is still not written."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]
        if self._is_late:
            log.warning("%s is complete again", self._path)
        self._is_late = False


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line that a killed run left unfinished is left out.

    Raises:
        ValueError: another line is no record of a step.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            if number < len(lines):
                raise ValueError(_no_record(path, number, f"is not valid JSON: {error}")) from error
            continue
        step = record.get("step") if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(_no_record(path, number, "is no record of a step"))
        records.append(record)
    return records


def _no_record(path: str | Path, number: int, reason: str) -> str:
    return f"{path}, line {number} {reason}; remove the line, or move the file away"


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
