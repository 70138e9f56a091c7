"""``manifest.json``: size and SHA-256 of every file of a checkpoint, and of the list itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

from vexact.trainer.checkpoint.error import CheckpointError

FILE = "manifest.json"
FORMAT = 3
"""Of a checkpoint directory. Format 2 kept the trainer's state in one file; format 1 had no manifest, too."""
WHOLE_STATE_FORMAT = 2
LFS_POINTER = b"version https://git-lfs"
"""How a file starts whose content Git LFS has not fetched."""
_BLOCK = 1 << 20
_MOST_THREADS = 8

Entry = dict[str, Any]  # {"bytes": int, "sha256": str}


class Digests:
    """Hashes the files below a directory in threads, beside the writing, flushing or reading of others.

    >>> with Digests(directory) as digests:          # doctest: +SKIP
    ...     write_large_file(directory)
    ...     digests.begin()
    ...     write_more(directory)
    ...     entries = digests.entries()
    """

    def __init__(
        self, directory: Path, known: Mapping[str, Entry] | None = None, only: Container[str] | None = None
    ) -> None:
        """
        Args:
            known: entries of files that were hashed while they were written.
            only: names of the files that count; all of them by default.
        """
        self._directory, self._stop = directory, Event()
        self._known, self._only = dict(known or {}), only
        self._pool = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="sha256")
        self._begun: dict[str, Future[Entry]] = {}

    def begin(self) -> None:
        """Starts on the files that are there and were not yet; they must be complete."""
        for path in sorted(self._directory.rglob("*")):
            name = path.relative_to(self._directory).as_posix()
            counts = name != FILE if self._only is None else name in self._only
            if counts and path.is_file() and name not in self._known and name not in self._begun:
                self._begun[name] = self._pool.submit(self._entry, path)

    def entries(self) -> dict[str, Entry]:
        """Of every file, by relative name. Raises OSError for a file that cannot be read."""
        self.begin()
        return self._known | {name: future.result() for name, future in self._begun.items()}

    def _entry(self, path: Path) -> Entry:
        digest, size, block = hashlib.sha256(), 0, bytearray(_BLOCK)
        view = memoryview(block)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(view[:count])
                size += count
                if self._stop.is_set():
                    break
        return {"bytes": size, "sha256": digest.hexdigest()}

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()  # an interrupted save does not wait for gigabytes to be hashed
        self._pool.shutdown(cancel_futures=True)


def write_manifest(directory: Path, step: int, entries: dict[str, Entry]) -> None:
    """Writes the manifest of ``directory``, which holds the checkpoint of ``step``."""
    (directory / FILE).write_bytes(_serialised({"format": FORMAT, "step": step, "files": entries}))


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """``{"format", "step", "files"}``; None where there is no manifest.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    file = directory / FILE
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        manifest = json.loads(data)
        del manifest["sha256"]
        found, intact = manifest["format"], _serialised(manifest) == data
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{file} is damaged: it is not the list of files that was saved") from None
    newer = f"format {found}, and this version of vexact reads up to format {FORMAT}"
    if not intact:
        what = f"; it names {newer}" if isinstance(found, int) and found > FORMAT else ""
        raise CheckpointError(f"{file} is damaged: it does not match its own SHA-256{what}")
    if found not in (WHOLE_STATE_FORMAT, FORMAT):
        raise CheckpointError(f"{directory} has checkpoint {newer}: use the version that wrote it, or a later one")
    return dict(manifest)


def verify(directory: Path) -> int | None:
    """Compares every file with the manifest and returns the step it is of; None where there is no manifest.

    Raises:
        CheckpointError: naming each file that is missing or differs, the manifest included.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    files: dict[str, Entry] = manifest["files"]
    with Digests(directory, only=files) as digests:
        try:
            found = digests.entries()
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    wrong = [
        f"{directory / name} {_difference(directory / name, found.get(name), files[name])}"
        for name in files
        if found.get(name) != files[name]
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong))
    return int(manifest["step"])


def _serialised(manifest: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, its own digest last: whatever else a file holds is damage."""
    content = json.dumps(manifest, indent=1, sort_keys=True)
    whole = manifest | {"sha256": hashlib.sha256(content.encode()).hexdigest()}
    return (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()


def _difference(file: Path, found: Entry | None, saved: Entry) -> str:
    if found is None:
        return "is missing"
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if found["bytes"] != saved["bytes"]:
        return f"has {found['bytes']} bytes, but {saved['bytes']} were saved"
    return f"is not what was saved: SHA-256 {found['sha256'][:12]}…, saved {saved['sha256'][:12]}…"
