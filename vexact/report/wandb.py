"""Weights & Biases: online with a key in the environment, offline without one, never a question."""

from __future__ import annotations

import secrets
from importlib import import_module
from pathlib import Path

from vexact.env import wandb_mode
from vexact.report.sink import MissingPackageError, RunInfo, Sink
from vexact.types import StepStats

RUN_ID_FILE = "wandb_run_id"


class WandbSink(Sink):
    """Logs every metric under its own name, at the trainer's step.

    The run id is kept in the run directory, so that a resumed run continues the same W&B run. Offline, that makes a
    second folder with the same id in ``<run>/wandb``; ``wandb sync --append`` joins them.
    """

    def __init__(self, run: RunInfo) -> None:
        """Raises MissingPackageError without the package wandb."""
        try:
            wandb = import_module("wandb")
        except ImportError as error:
            raise MissingPackageError("wandb", "wandb") from error
        self._run = wandb.init(
            project=run.project,
            name=run.experiment,
            id=_run_id(run.run_dir / RUN_ID_FILE, fresh=run.resume_step is None),
            resume="allow",
            mode=wandb_mode(),
            dir=str(run.run_dir),
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def step(self, stats: StepStats) -> None:
        self._run.log(dict(stats.metrics), step=stats.step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path, fresh: bool) -> str:
    if not fresh and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id
