"""Weights & Biases: online with a key in the environment, offline without; never a question or the end of a run."""

from __future__ import annotations

import logging
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any

from vexact.env import tidy_wandb, wandb_mode
from vexact.report.sink import MissingPackageError, RunInfo, Sink
from vexact.types import StepStats

RUN_ID_FILE = "wandb_run_id"
START_TIMEOUT_S = 10  # how long a server that does not answer holds up the start
FINISH_TIMEOUT_S = 60  # and the end; what is not uploaded by then stays on disk
log = logging.getLogger(__name__)


class WandbSink(Sink):
    """Logs every metric under its own name, at the trainer's step.

    The run id is kept in the run directory, so that a resumed run continues the same W&B run. Offline, that makes a
    second folder with the same id in ``<run>/wandb``; ``wandb sync --append`` joins them.

    A server that cannot be reached, or a key that it does not take, makes the run an offline one. Whatever else fails
    here costs the W&B record, never the run.
    """

    def __init__(self, run: RunInfo) -> None:
        """Raises MissingPackageError without the package wandb, ValueError for an unknown WANDB_MODE."""
        tidy_wandb()
        mode = wandb_mode()
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise MissingPackageError("wandb", "wandb") from error
        run_id = _run_id(run.run_dir / RUN_ID_FILE, fresh=run.resume_step is None)
        self._run = _started(wandb, run, run_id, mode)

    def step(self, stats: StepStats) -> None:
        if self._run is None:
            return
        try:
            self._run.log(dict(stats.metrics), step=stats.step)
        except Exception as error:
            self._run = None
            log.warning("W&B failed at step %d and gets no further steps: %s", stats.step, _first_line(error))

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            log.warning("W&B could not finish its run: %s", _first_line(error))


def _started(wandb: Any, run: RunInfo, run_id: str, mode: str) -> Any:
    """The W&B run; offline where the server does not answer, None where that fails too."""
    try:
        return _init(wandb, run, run_id, mode)
    except Exception as error:
        if mode == "offline":
            log.warning("W&B cannot start, so nothing is written for it: %s", _first_line(error))
            return None
        log.warning("W&B cannot be reached, so this run is written offline, for `wandb sync`: %s", _first_line(error))
    try:
        wandb.teardown()  # its service still holds the run id
    except Exception as error:
        log.debug("W&B's service did not stop: %s", error)
    return _started(wandb, run, run_id, "offline")


def _init(wandb: Any, run: RunInfo, run_id: str, mode: str) -> Any:
    limits: dict[str, float] = {"init_timeout": START_TIMEOUT_S, "login_timeout": START_TIMEOUT_S}
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):  # newer than the oldest supported version
        limits["finish_timeout"] = FINISH_TIMEOUT_S
    return wandb.init(
        project=run.project,
        name=run.experiment,
        id=run_id,
        resume="allow",
        mode=mode,
        dir=str(run.run_dir),
        config=dict(run.config),
        settings=wandb.Settings(console="off", silent=True, **limits),
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _run_id(path: Path, fresh: bool) -> str:
    if not fresh and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id
