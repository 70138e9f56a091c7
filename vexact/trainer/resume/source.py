"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vexact.config import Config
from vexact.trainer.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Progress,
    load_checkpoint,
    read_identity,
    verify_checkpoint,
)
from vexact.trainer.resume.changes import Identity, breaking_changes, environment_changes

log = logging.getLogger(__name__)


class Restorable(Protocol):
    """What holds an actor: ``vexact.trainer.workers.Workers``."""

    def restore(self, path: Path) -> Progress: ...


class ResumeError(ValueError):
    """The checkpoint is of a run that is not this one; the message names every change."""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that a run goes on from: every file compared with the manifest, the tensors not read yet."""

    path: Path
    in_this_run: bool  # it lies in this run directory's ``checkpoints``
    step: int | None  # None: format 1 under another name than step_N, of which only the tensors' file knows
    identity: Identity | None  # None: format 1

    def restore(self, workers: Restorable) -> Progress:
        """Puts the state into the actor and says where the run stands.

        Raises:
            CheckpointError: a file is damaged, or the state is not this model's.
        """
        progress = workers.restore(self.path)
        named = self.path.name.removeprefix("step_")
        if self.in_this_run and named != str(progress.step):
            raise CheckpointError(
                f"{self.path} holds step {progress.step}: it was renamed or copied in. Give it its name back, or go "
                f"on from it by trainer.resume_mode=resume_path trainer.resume_from_path=… from another directory"
            )
        return progress


def find_source(config: Config, store: CheckpointStore) -> Source | None:
    """As ``trainer.resume_mode`` says; None when the run starts anew.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or which one is meant is unclear.
    """
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return None
    path: Path | None
    if trainer.resume_mode == "resume_path":
        path = Path(os.path.expanduser(str(trainer.resume_from_path)))
    else:
        path = store.latest()
    if path is None:
        return None
    if not path.is_dir():
        load_checkpoint(path)  # raises, and names what there is instead
    step, name = verify_checkpoint(path), path.name.removeprefix("step_")
    if step is None and name.isdecimal():
        step = int(name)
    in_this_run = name.isdecimal() and path.parent.resolve() == store.directory.resolve()
    return Source(path, in_this_run, step, read_identity(path))


def check_changes(source: Source, identity: Identity, allow: bool, told: Sequence[str] = ()) -> list[str]:
    """Compares what the run was with what it is now; returns what changed, and says so unless it was ``told``.

    Raises:
        ResumeError: something that decides the bits changed, and ``allow`` is false.
    """
    changes = [] if source.identity is None else breaking_changes(source.identity, identity)
    if not changes or changes == list(told):
        return changes
    lines = "\n".join(f"  {line}" for line in changes)
    if not allow:
        raise ResumeError(
            f"{source.path} is of a run that differs from this one, so the next steps would not be those of an "
            f"uninterrupted run:\n{lines}\nUndo this; or start anew with trainer.resume_mode=disable, which sets the "
            "checkpoints here aside; or give this run another trainer.default_local_dir; or go on all the same with "
            "trainer.resume_changed=allow"
        )
    log.warning("going on from %s although this run differs from the one that saved it:\n%s", source.path, lines)
    return changes


def note_environment(source: Source, identity: dict[str, Any]) -> None:
    """Says which versions or devices are others than when the checkpoint was saved."""
    changes = environment_changes(source.identity or {}, identity)
    if source.identity is not None and changes:
        log.warning("saved on another machine or other versions, so the bits may differ: %s", ", ".join(changes))
