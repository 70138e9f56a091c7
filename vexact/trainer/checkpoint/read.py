"""Reading a checkpoint back, every file checked first."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vexact.trainer.checkpoint import manifest, state_file
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.pointer import FOLDER
from vexact.trainer.checkpoint.state_file import Progress
from vexact.training import ActorState

log = logging.getLogger(__name__)
IDENTITY_FILE = "identity.json"


def verify_checkpoint(path: Path) -> int | None:
    """Compares every file of a checkpoint with its manifest; returns its step, None in format 1, which has no manifest.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    with _advised(path):
        step = manifest.verify(path)
        _require_state(path)
        return step


def load_checkpoint(path: Path, *, verified: bool = False) -> tuple[Progress, ActorState]:
    """Reads a checkpoint directory whose every file is what was saved.

    Args:
        verified: ``verify_checkpoint`` has just compared the files.

    Raises:
        CheckpointError: it is missing, damaged, not readable or of a newer format. The message names the file and a
            checkpoint beside it that is whole, if there is one.
    """
    with _advised(path):
        progress, state, has_manifest = _load(path, verified)
    if not has_manifest:
        log.warning(
            "%s was written by an earlier version: it has no digests of its other files and no record of its "
            "configuration, data, model, tokenizer and reward, so whether they are the same cannot be checked",
            path,
        )
    return progress, state


def read_identity(path: Path) -> dict[str, Any] | None:
    """What the run was that saved it; None in format 1. Raises CheckpointError when it is not readable."""
    file = path / IDENTITY_FILE
    try:
        identity = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; {advice(path.parent, path)}") from error
    if not isinstance(identity, dict):
        raise CheckpointError(f"{file} is damaged: it holds no record of a run; {advice(path.parent, path)}")
    return identity


def advice(directory: Path, damaged: Path | None = None) -> str:
    """How to go on: from the newest whole checkpoint of ``directory`` other than ``damaged``, or anew."""
    anew = "trainer.resume_mode=disable starts anew and sets what is here aside"
    others = sorted(
        (path for path in directory.glob("step_*") if path != damaged and path.name[5:].isdecimal()),
        key=lambda path: int(path.name[5:]),
        reverse=True,
    )
    for number, path in enumerate(others):
        if _is_whole(path):
            older = ", ".join(each.name for each in others[number + 1 :])
            more = f" (older: {older}, not checked)" if older else ""
            return (
                f"{path.name} is whole{more}: go on from it with trainer.resume_mode=resume_path "
                f"trainer.resume_from_path={path}; {anew}"
            )
    seen = f"none of the others here ({', '.join(path.name for path in others)}) is whole" if others else ""
    where = "give a checkpoints/step_N directory in trainer.resume_from_path"
    return f"{seen or 'there is no other checkpoint beside it'}; {where}, or trainer.resume_mode=disable to start anew"


def _is_whole(path: Path) -> bool:
    try:
        if manifest.verify(path) is None:
            _load(path)
    except CheckpointError:
        return False
    return True


@contextmanager
def _advised(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice(_neighbours(path), path)}") from error


def _neighbours(path: Path) -> Path:
    """Where to look for others: around ``path``, or in it when it is a run directory or its ``checkpoints``."""
    return next((each for each in (path / FOLDER, path) if any(each.glob("step_*"))), path.parent)


def _load(path: Path, verified: bool = False) -> tuple[Progress, ActorState, bool]:
    """Progress, state, and whether there was a manifest to check every file with."""
    file = path / state_file.FILE
    listed = manifest.read_manifest(path)
    saved_step = None if listed is None else listed["step"]
    if listed is not None and not verified:
        manifest.verify(path)
    _require_state(path)
    version, progress, state = state_file.read_state(file, check_crc=saved_step is None)
    if saved_step is None and version != 1:
        raise CheckpointError(f"{path / manifest.FILE} is missing, so nothing in {path} can be checked")
    if saved_step not in (None, progress.step):
        raise CheckpointError(f"{path / manifest.FILE} is of step {saved_step}, {file} of step {progress.step}")
    return progress, state, saved_step is not None


def _require_state(path: Path) -> None:
    if not (path / state_file.FILE).is_file():
        raise CheckpointError(f"{path} is not a checkpoint (no {state_file.FILE})")
