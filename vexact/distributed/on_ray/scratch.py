"""What a Ray cluster of our own takes of its machine: a folder, shared memory, a secret. It goes with the driver."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vexact import env
from vexact.distributed.on_ray import warden

PREFIX = "vexact-ray-"
OBJECT_STORE_BYTES = 1 << 30  # batches and results pass through it, weights never do
_PATH_ROOM = 12  # characters of a temporary folder, so that the paths of Ray's sockets in ours stay under 107
_TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once


class Scratch:
    """Held by one driver; a warden process frees it when the driver does, or is no more.

    ``options`` are further arguments of ``ray.init``.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        folder = _folder()
        if folder is not None:
            self.options["_temp_dir"] = str(folder)
        if _has_shared_memory():
            self.options["object_store_memory"] = OBJECT_STORE_BYTES
        self._mark = secrets.token_hex(16)
        command = [sys.executable, "-I", "-S", warden.__file__, self._mark, str(folder or "")]
        self._warden = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        env.set_ray_token(_TOKEN)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """What is started inside belongs to the cluster."""
        with env.ray_run(self._mark):
            yield

    def remove(self) -> None:
        """Ends what is left of the cluster. Idempotent."""
        env.unset_ray_token(_TOKEN)
        if self._warden.stdin is not None:
            self._warden.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._warden.wait(warden.PATIENCE_S + 5.0)


def _folder() -> Path | None:
    """A new folder for Ray's sockets and logs; None leaves the choice to Ray."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(parent) <= _PATH_ROOM:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    return None


def _has_shared_memory() -> bool:
    """Whether /dev/shm has room for the object store; without, Ray finds a place and a size."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free > 2 * OBJECT_STORE_BYTES
    return False
