"""The run directory before anything is in it: made, locked and tried, and cleared of an earlier life of the run."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from vexact.audit.certificate import FILE as CERTIFICATE
from vexact.report.html import FILE_NAME as REPORT
from vexact.report.sinks.jsonl import FILE_NAME as METRICS_FILE
from vexact.report.sinks.wandb import RUN_ID_FILE
from vexact.report.starts import FILE_NAME as STARTS_FILE
from vexact.trainer.checkpoint import CheckpointStore
from vexact.trainer.run.lock import run_lock
from vexact.trainer.run.pending_step import FILE as PENDING_FILE
from vexact.trainer.run.validation import FOLDER as VALIDATIONS
from vexact.trainer.step.diagnose import REPLAY_FILE, TEXT_FILE
from vexact.trainer.step.profile import FOLDER as PROFILE

SAMPLES, TENSORBOARD = "samples", "tensorboard"
DIVERGENCE = (TEXT_FILE, REPLAY_FILE)
_TRIAL = b"\0" * (1 << 16)
_FILE_OF_STEP = re.compile(r"[a-z]+_(\d+)[._].*")


class RunDirectoryError(ValueError):
    """The run directory cannot be used; the message names it and the reason."""


@contextmanager
def open_run_directory(run_dir: Path, needed_bytes: int) -> Iterator[None]:
    """Makes the directory, locks it, and writes to it once: a run must not find out with its first checkpoint.

    Args:
        needed_bytes: what one checkpoint takes on disk.

    Raises:
        RunDirectoryError: it is a file or not writable, or its disk is full.
        RunLockedError: another run is in it.
    """
    with ExitStack() as stack:
        with _refusing(run_dir):
            _require_directory(run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_if_empty, run_dir)
            stack.enter_context(run_lock(run_dir))
            _try_writing(run_dir, needed_bytes, lambda folder: _write_once(folder / ".write-test"))
        yield


def check_run_directory(run_dir: Path, needed_bytes: int) -> None:
    """Refuses what ``open_run_directory`` would, the lock aside, and makes nothing.

    Raises:
        RunDirectoryError: as there.
    """
    with _refusing(run_dir):
        _require_directory(run_dir)
        if run_dir.is_dir():
            _try_writing(run_dir, needed_bytes, _write_unnamed)
            return
        above = next(folder for folder in run_dir.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(None, "not a directory", str(above))
        longest = os.pathconf(above, "PC_NAME_MAX")
        for name in run_dir.absolute().relative_to(above).parts:
            if len(os.fsencode(name)) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(run_dir))
        _try_writing(above, needed_bytes, _write_unnamed)


@contextmanager
def _refusing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"the run directory {run_dir} cannot be used: {error.strerror or error}"
            f"{f' ({error.filename})' if error.filename else ''}; set trainer.default_local_dir to a directory "
            "that can be written"
        ) from error


def _require_directory(run_dir: Path) -> None:
    try:
        os.lstat(run_dir)
    except FileNotFoundError:
        return
    if not run_dir.is_dir():
        raise NotADirectoryError(None, "it is not a directory", None)


def set_aside(run_dir: Path, store: CheckpointStore, after: int) -> str:
    """Moves what an abandoned part of the run left out of the way of the part that begins.

    Args:
        after: the step that the run goes on from; -1 when it starts anew and nothing of the earlier run stays.

    Returns:
        What was moved, for one line of the log; empty when there was nothing.
    """
    anew = after < 0
    number = next(n for n in count(1) if not any(place.exists() for place in _places(run_dir, store, n)))
    moved = []
    if steps := store.steps(after):
        names = f"step_{steps[0]}" if len(steps) == 1 else f"step_{steps[0]} to step_{steps[-1]}"
        moved.append(f"{store.set_aside(steps, number).name} ({names})")
    moved += [f"{name}.{number}" for name in (SAMPLES, PROFILE) if _move_files(run_dir / name, after, number)]
    for file in (run_dir / METRICS_FILE, run_dir / STARTS_FILE):
        if file.exists():
            kept = file.with_name(_numbered(file.name, number))
            if anew:
                file.rename(kept)
            else:
                shutil.copy(file, kept)  # the lines up to the step stay, too
            moved.append(kept.name)
    for name in (TENSORBOARD, VALIDATIONS) if anew else ():
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.{number}")
    if anew and (run_dir / REPORT).exists():
        (run_dir / REPORT).rename(run_dir / _numbered(REPORT, number))
        moved.append(_numbered(REPORT, number))
    if anew:
        (run_dir / CERTIFICATE).unlink(missing_ok=True)  # the checkpoints of that run have it
    (run_dir / RUN_ID_FILE).unlink(missing_ok=True)  # a W&B run cannot go back: what begins is another one
    (run_dir / PENDING_FILE).unlink(missing_ok=True)
    return ", ".join(moved)


def set_divergence_aside(run_dir: Path) -> str:
    """Moves where an earlier start was stopped by the audit, which does not hold of the part that begins, out of its
    way; returns what was moved."""
    found = [run_dir / name for name in DIVERGENCE if (run_dir / name).exists()]
    free = (n for n in count(1) if not any((run_dir / _numbered(name, n)).exists() for name in DIVERGENCE))
    number = next(free)
    for file in found:
        file.rename(file.with_name(_numbered(file.name, number)))
    return ", ".join(_numbered(file.name, number) for file in found)


def _numbered(name: str, number: int) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{number}.{suffix}"


def _places(run_dir: Path, store: CheckpointStore, number: int) -> list[Path]:
    names = [
        _numbered(METRICS_FILE, number),
        _numbered(STARTS_FILE, number),
        _numbered(REPORT, number),
        *(f"{n}.{number}" for n in (SAMPLES, PROFILE, TENSORBOARD, VALIDATIONS)),
    ]
    return [store.place_aside(number), *(run_dir / name for name in names)]


def _move_files(folder: Path, after: int, number: int) -> bool:
    files = list(folder.iterdir()) if folder.is_dir() else []
    matches = ((file, _FILE_OF_STEP.fullmatch(file.name)) for file in files)
    abandoned = [file for file, match in matches if match is not None and int(match[1]) > after]
    place = folder.with_name(f"{folder.name}.{number}")
    if abandoned:
        place.mkdir(exist_ok=True)
    for file in abandoned:
        file.rename(place / file.name)
    return bool(abandoned)


def _try_writing(run_dir: Path, needed_bytes: int, write: Callable[[Path], None]) -> None:
    for folder in (run_dir, run_dir / "checkpoints", run_dir / SAMPLES):
        if folder.is_dir():
            write(folder)
        elif os.path.lexists(folder):
            raise NotADirectoryError(None, "not a directory", str(folder))
    free = shutil.disk_usage(run_dir / "checkpoints" if (run_dir / "checkpoints").is_dir() else run_dir).free
    if free < needed_bytes:
        needed = f"a checkpoint needs {needed_bytes / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
        raise OSError(None, f"its disk is too full: {needed}")


def _write_once(file: Path) -> None:
    try:
        with file.open("wb") as opened:
            opened.write(_TRIAL)
            opened.flush()
            os.fsync(opened.fileno())
    finally:
        file.unlink(missing_ok=True)


def _write_unnamed(folder: Path) -> None:
    """A file without a name, which ends when it is closed; where the disk has none, an empty folder for a moment."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        os.rmdir(tempfile.mkdtemp(prefix=".write-test-", dir=folder))
        return
    try:
        os.write(descriptor, _TRIAL)
    finally:
        os.close(descriptor)


def _remove_if_empty(run_dir: Path) -> None:
    """A run that ends before it wrote anything leaves nothing."""
    with suppress(OSError):
        run_dir.rmdir()
