"""Weights & Biases: online with a key in the environment, offline without; never a question or the end of a run."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vexact.env import tidy_wandb, wandb_mode
from vexact.report.panels import present_panels
from vexact.report.samples.table import COLUMNS, Row
from vexact.report.sinks.sink import MissingPackageError, RunInfo, Sink
from vexact.report.summaries import summary_of
from vexact.types import StepStats

RUN_ID_FILE = "wandb_run_id"
STEP = "training/global_step"
START_TIMEOUT_S = 10  # how long a server that does not answer holds up the start
FINISH_TIMEOUT_S = 60  # and the end; what is not uploaded by then stays on disk
log = logging.getLogger(__name__)


class WandbSink(Sink):
    """Logs every metric under its own name over the trainer's step, tables of samples, and the run's page.

    The run id is kept in the run directory, so that a resumed run continues the same W&B run. W&B refuses steps lower
    than one it has, which a resumed run may repeat; so rows go in as they come, and ``training/global_step`` is their
    x axis. Offline, a resumed run makes a second folder with the same id in ``<run>/wandb``; ``wandb sync --append``
    joins them.

    A server that cannot be reached, or a key that it does not take, makes the run an offline one.
    """

    def __init__(self, run: RunInfo) -> None:
        """Raises MissingPackageError without the package wandb, ValueError for an unknown WANDB_MODE."""
        tidy_wandb()
        mode = wandb_mode()
        try:
            self._wandb: Any = import_module("wandb")
        except ImportError as error:
            raise MissingPackageError("wandb", "wandb") from error
        run_id = _run_id(run.run_dir / RUN_ID_FILE, fresh=run.resume_step is None)
        self._run = _started(self._wandb, run, run_id, mode)
        self._defined: set[str] = {STEP}
        self._run.define_metric(STEP, hidden=True)

    def step(self, stats: StepStats) -> None:
        self._define(stats.metrics)
        self._log(stats.step, dict(stats.metrics))

    def samples(self, step: int, stem: str, rows: Sequence[Row]) -> None:
        table = self._wandb.Table(columns=["step", *COLUMNS], data=[[step, *row] for row in rows])
        self._log(step, {f"samples/{stem}": table})

    def page(self, path: Path, step: int) -> None:
        self._log(step, {"report": self._wandb.Html(str(path), inject=False)})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values | {STEP: step})

    def _define(self, names: Iterable[str]) -> None:
        """Metrics that were not there before: those of the report's pictures in their order, then the others."""
        new = set(names) - self._defined
        self._defined |= new
        shown = [name for panels in present_panels(new).values() for panel in panels.values() for name in panel]
        for name in dict.fromkeys([*shown, *sorted(new)]):
            if "*" not in name:  # which W&B takes for a pattern, and at most at the end
                self._run.define_metric(name, step_metric=STEP, summary=summary_of(name))


def _started(wandb: Any, run: RunInfo, run_id: str, mode: str) -> Any:
    """The W&B run; offline where the server does not answer. Raises RuntimeError where that fails, too."""
    if mode != "offline":
        try:
            return _init(wandb, run, run_id, mode)
        except Exception as error:
            log.warning("W&B cannot be reached, so this run is written offline, for `wandb sync`: %s", _named(error))
        try:
            wandb.teardown()  # its service still holds the run id
        except Exception as error:
            log.debug("W&B's service did not stop: %s", error)
    try:
        return _init(wandb, run, run_id, "offline")
    except Exception as error:  # among them ValueErrors, which are none of the user's configuration
        raise RuntimeError(_named(error)) from error


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


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _run_id(path: Path, fresh: bool) -> str:
    if not fresh and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id
