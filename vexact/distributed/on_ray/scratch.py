"""What a Ray cluster of our own takes of its machine: a folder, shared memory, a secret. It goes with the run."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from vexact import env

PREFIX, LOCK = "vexact-ray-", "driver.lock"
OBJECT_STORE_BYTES = 1 << 30  # batches and results pass through it, weights never do
_PATH_ROOM = 12  # characters of a temporary folder, so that the paths of Ray's sockets in ours stay under 107
_TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once


class Scratch:
    """Held by one driver; ``options`` are further arguments of ``ray.init``."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self._lock = -1
        self._folder = _folder()
        if self._folder is not None:
            self.options["_temp_dir"] = str(self._folder)
            self._lock = os.open(self._folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _has_shared_memory():
            self.options["object_store_memory"] = OBJECT_STORE_BYTES
        env.set_ray_token(_TOKEN)

    def remove(self) -> None:
        """Idempotent."""
        env.unset_ray_token(_TOKEN)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = None


def _folder() -> Path | None:
    """A new folder for Ray's sockets and logs; None leaves the choice to Ray. Those of killed drivers are removed."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(parent) <= _PATH_ROOM:
            for left in Path(parent).glob(f"{PREFIX}*"):
                _remove_if_left(left)
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    return None


def _remove_if_left(folder: Path) -> None:
    """Removes the folder of a driver that is gone: nobody holds its lock, which the kernel took back."""
    with suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _has_shared_memory() -> bool:
    """Whether /dev/shm has room for the object store; without, Ray finds a place and a size."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free > 2 * OBJECT_STORE_BYTES
    return False
