"""``trainer_state.pt`` of formats 1 and 2: where the run stood and the actor's whole state. Read, never written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.manifest import LFS_POINTER
from vexact.trainer.checkpoint.progress import Progress, is_count
from vexact.training import ActorState

FILE = "trainer_state.pt"
_ZIP = b"PK\x03\x04"


def read_state(file: Path, *, check_crc: bool) -> tuple[int, Progress, ActorState]:
    """Its format (1 where it names none), the progress and the state.

    Args:
        check_crc: compare the CRC-32 of each part first, for a file without a manifest beside it.

    Raises:
        CheckpointError: whatever is wrong with the file.
    """
    _check_kind(file)
    if check_crc:
        _check_crc(file)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"cannot read {file}: {reason[:200]}") from error
    return _unpacked(file, saved)


def _check_crc(file: Path) -> None:
    try:
        with zipfile.ZipFile(file) as parts:
            damaged = parts.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{file} is damaged: the checksum of {damaged} differs")


def _check_kind(file: Path) -> None:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{file} is empty")
    if start == LFS_POINTER:
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if not start.startswith(_ZIP):
        raise CheckpointError(f"{file} is not a file of torch.save (it starts with {start[:12]!r})")


def _unpacked(file: Path, saved: Any) -> tuple[int, Progress, ActorState]:
    if not isinstance(saved, dict) or not {"progress", "actor"} <= saved.keys():
        keys = ", ".join(map(str, list(saved)[:5])) if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"{file} is another program's file: it has no 'progress' and 'actor', only {keys}")
    progress, actor = saved["progress"], saved["actor"]
    if not (isinstance(progress, (tuple, list)) and len(progress) == 2 and all(map(is_count, progress))):
        raise CheckpointError(f"{file}: 'progress' is {progress!r:.80}; expected a step and a data cursor")
    if not isinstance(actor, dict) or not {"num_updates", "parameters"} <= actor.keys():
        raise CheckpointError(f"{file}: 'actor' lacks 'num_updates' or 'parameters'")
    if not is_count(actor["num_updates"]) or not isinstance(actor["parameters"], dict):
        raise CheckpointError(f"{file}: 'actor' holds no number of updates or no parameters by name")
    state = ActorState(num_updates=actor["num_updates"], parameters=actor["parameters"])
    return saved.get("format", 1), Progress(*progress), state
