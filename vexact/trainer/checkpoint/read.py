"""Reading a checkpoint back, every file checked first."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vexact.trainer.checkpoint import manifest, shard_files, state_file
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.pointer import FOLDER
from vexact.trainer.checkpoint.progress import FILE as PROGRESS
from vexact.trainer.checkpoint.progress import Progress, read_progress
from vexact.trainer.checkpoint.shard_reader import ShardedState
from vexact.training import Actor, ActorState

log = logging.getLogger(__name__)
IDENTITY_FILE = "identity.json"


def verify_checkpoint(path: Path) -> int | None:
    """Compares every file of a checkpoint with its manifest; returns its step, None in format 1, which has no manifest.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    with _advised(path):
        step = manifest.verify(path)
        _format(path)
        return step


def load_checkpoint(path: Path) -> tuple[Progress, ActorState]:
    """Reads a checkpoint directory, whole and on the host, whose every file is what was saved.

    Raises:
        CheckpointError: it is missing, damaged, not readable or of a newer format. The message names the file and a
            checkpoint beside it that is whole, if there is one.
    """
    with _advised(path):
        progress, state, has_manifest = _load(path)
    if not has_manifest:
        _warn_unchecked(path)
    return progress, state


def restore(path: Path, actor: Actor) -> Progress:
    """Puts the state of a checkpoint that ``verify_checkpoint`` has just compared into ``actor``.

    All of the actor's ranks call it together. Each reads only its own rows, however many ranks wrote them.

    Raises:
        CheckpointError: the state is not this model's, or not one to go on from; ``actor`` is as it was then.
        PeerStopped: on the other ranks.
    """
    ranks = actor.ranks
    state: ShardedState | ActorState
    with ranks.together(), _advised(path):
        version = _format(path)
        if version == manifest.FORMAT:
            progress, state = _open(path)
        elif ranks.is_first:
            progress, state = _load_whole(path, version)
        else:
            progress, state = Progress(0, 0), ActorState(num_updates=0, parameters={})
    try:
        if isinstance(state, ShardedState):
            blank = actor.blank_state(state.has_moments)
            with ranks.together():
                stored = state.read_into(blank)
            actor.load_sharded_state(stored)
        else:
            actor.load_state_dict(state)
            progress = ranks.from_first(progress)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if version == 1 and ranks.is_first:
        _warn_unchecked(path)
    return progress


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


def _warn_unchecked(path: Path) -> None:
    log.warning(
        "%s was written by an earlier version: it has no digests of its other files and no record of its "
        "configuration, data, model, tokenizer and reward, so whether they are the same cannot be checked",
        path,
    )


def _neighbours(path: Path) -> Path:
    """Where to look for others: around ``path``, or in it when it is a run directory or its ``checkpoints``."""
    return next((each for each in (path / FOLDER, path) if any(each.glob("step_*"))), path.parent)


def _load(path: Path) -> tuple[Progress, ActorState, bool]:
    """Progress, state, and whether there was a manifest to check every file with."""
    manifest.verify(path)
    version = _format(path)
    if version == manifest.FORMAT:
        progress, sharded = _open(path)
        return progress, sharded.whole(), True
    progress, state = _load_whole(path, version)
    return progress, state, version > 1


def _format(path: Path) -> int:
    """What the directory claims to be, and has the parts of."""
    listed = manifest.read_manifest(path)
    version = 1 if listed is None else int(listed["format"])
    _require_state(path)
    if listed is None and (path / shard_files.FOLDER).is_dir():
        raise CheckpointError(_unchecked(path))
    return version


def _open(path: Path) -> tuple[Progress, ShardedState]:
    """Of format 3."""
    progress, state = read_progress(path), ShardedState(path / shard_files.FOLDER)
    _require_step(path, progress.step)
    if state.step != progress.step:
        raise CheckpointError(f"{state.directory} is of step {state.step}, {path / PROGRESS} of step {progress.step}")
    return progress, state


def _load_whole(path: Path, version: int) -> tuple[Progress, ActorState]:
    """Of the formats before."""
    file = path / state_file.FILE
    saved_version, progress, state = state_file.read_state(file, check_crc=version == 1)
    if version == 1 and saved_version != 1:
        raise CheckpointError(_unchecked(path))
    _require_step(path, progress.step)
    return progress, state


def _require_step(path: Path, step: int) -> None:
    listed = manifest.read_manifest(path)
    if listed is not None and listed["step"] != step:
        raise CheckpointError(f"{path / manifest.FILE} is of step {listed['step']}, the state beside it of step {step}")


def _require_state(path: Path) -> None:
    if not (path / shard_files.FOLDER).is_dir() and not (path / state_file.FILE).is_file():
        raise CheckpointError(f"{path} is not a checkpoint (no {shard_files.FOLDER})")


def _unchecked(path: Path) -> str:
    return f"{path / manifest.FILE} is missing, so nothing in {path} can be checked"
