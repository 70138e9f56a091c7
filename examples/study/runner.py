"""Many runs in parallel processes, each recorded when it is finished; what is recorded is not run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from grid import RunSpec
from one_run import LOG, ROW, run_and_record
from subject import prepare_subject

RESULTS = "results.jsonl"
# imported once by a process that does nothing else, and every run is a fork of that one
_PRELOAD = ["one_run", "vexact.commands.train", "vexact.trainer.launch", "torch._dynamo", "triton", "hydra"]
_PRELOAD += ["pyarrow.parquet", "transformers.generation", "transformers.models.auto.tokenization_auto"]
_POLL_S = 0.5


def run_all(specs: Sequence[RunSpec], work: Path, workers: int, seconds: float | None = None) -> list[str]:
    """Runs what is not in ``work/results.jsonl`` yet, ``workers`` processes at a time, in order.

    Args:
        work: also holds subjects and, while they run, run directories.
        seconds: after these nothing more begins.

    Returns:
        The ids of the runs that failed, with their logs kept in ``work/runs``.
    """
    work.mkdir(parents=True, exist_ok=True)
    for spec in {spec.subject: spec for spec in specs}.values():
        prepare_subject(work / "subjects" / spec.subject, **spec.prepare)
    _drop_cut_line(work / RESULTS)
    done = {row["id"] for row in read_rows(work / RESULTS)}
    waiting = [spec for spec in specs if spec.id not in done]
    deadline = None if seconds is None else time.monotonic() + seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    running: dict[Any, tuple[RunSpec, Any]] = {}
    failed: list[str] = []
    total, finished = len(waiting), 0
    try:
        while waiting or running:
            if deadline is not None and time.monotonic() > deadline:
                waiting.clear()
            while waiting and _fits(waiting[0], [spec for spec, _ in running.values()], workers):
                spec = waiting.pop(0)
                process = context.Process(target=run_and_record, args=(_placed(spec, work), work / "runs" / spec.id))
                process.start()
                running[process.sentinel] = spec, process
            for sentinel in wait(list(running), timeout=_POLL_S):
                spec, process = running.pop(sentinel)
                process.join()
                finished += 1
                row = _record(work, spec)
                if row is None:
                    failed.append(spec.id)
                said = f"failed, see {work / 'runs' / spec.id / LOG}" if row is None else f"{row['wall_s']:.0f} s"
                print(f"{finished}/{total} {spec.id}: {said}", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return failed


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file. A last line that a kill has cut off is left out."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # whole lines end with a newline
    return [json.loads(line) for line in lines]


def _drop_cut_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _fits(spec: RunSpec, running: Sequence[RunSpec], workers: int) -> bool:
    return not running or sum(other.processes for other in running) + spec.processes <= workers


def _placed(spec: RunSpec, work: Path) -> RunSpec:
    """With the folder of its subject in the place of ``{subject}``."""
    folder = str(work / "subjects" / spec.subject)
    return replace(
        spec,
        overrides=tuple(text.replace("{subject}", folder) for text in spec.overrides),
        exact=tuple(text.replace("{subject}", folder) for text in spec.exact),
    )


def _record(work: Path, spec: RunSpec) -> dict[str, Any] | None:
    """Moves the row of a finished run into the results and its directory away; None if it has no row."""
    directory = work / "runs" / spec.id
    if not (directory / ROW).is_file():
        return None
    text = (directory / ROW).read_text(encoding="utf-8")
    with open(work / RESULTS, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(directory)
    row: dict[str, Any] = json.loads(text)
    return row
