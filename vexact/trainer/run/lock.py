"""A lock that keeps a second run out of a run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FILE = "run.lock"
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LOCAL_DISKS = ("ext", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "f2fs", "ramfs", "apfs")


class RunLockedError(RuntimeError):
    """Another run has the directory, or may have it."""


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds ``run.lock``, which names host, process and start time, while the block runs.

    The kernel's lock ends with its process, so what a killed run leaves is free again. Whether it also holds between
    the hosts of a network disk is up to that disk: there, and where there are no such locks, the file's content counts.

    Raises:
        RunLockedError: another run holds it; or one of another host did and did not say that it ended.
        OSError: the directory cannot be written.
    """
    file = run_dir / FILE
    descriptor = _acquire(file)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_myself()).encode() + b"\n", 0)
        os.fsync(descriptor)
        yield
    finally:
        with suppress(FileNotFoundError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            kernel_lock = _flock(descriptor, file)
            holder = _holder(descriptor)
            if holder is not None:
                _refuse_living(holder, file, kernel_lock)
            if _is_still(file, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its run ended and removed the file while we waited for it


def _flock(descriptor: int, file: Path) -> bool:
    """Whether this disk has the kernel's locks; raises RunLockedError when another process has this one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        if holder is None:
            time.sleep(0.2)  # it has the lock and is about to write its name
            holder = _holder(descriptor)
        raise RunLockedError(
            f"{file.parent} is in use by another run ({_describe(holder)}); wait for it or stop it, or give this run "
            "a directory of its own with trainer.default_local_dir"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _refuse_living(holder: dict[str, Any], file: Path, kernel_lock: bool) -> None:
    """``holder`` did not remove its lock: killed, or alive where its lock cannot be seen."""
    if holder.get("host") != socket.gethostname():
        if kernel_lock and _is_local_disk(file.parent):
            return
        raise RunLockedError(
            f"{file.parent} was taken by a run on another host ({_describe(holder)}) that has not said it ended; if it "
            f"has, remove {file} and start again"
        )
    if not kernel_lock and holder.get("started") == _started(holder.get("pid")):
        raise RunLockedError(
            f"{file.parent} is in use by another run ({_describe(holder)}); wait for it or stop it, or give this run "
            "a directory of its own with trainer.default_local_dir"
        )


def _myself() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "started": _started(os.getpid())}


def _holder(descriptor: int) -> dict[str, Any] | None:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _describe(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "which has not written its name yet"
    return f"pid {holder.get('pid')} on host {holder.get('host')}, since {holder.get('since')}"


def _started(pid: Any) -> str | None:
    """When a living process of this host started, in its kernel's ticks, so that a reused pid is another; else None."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return None
    return fields[19]


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_local_disk(directory: Path) -> bool:
    """Whether all who see this directory share our kernel; False where that is not known."""
    place = directory.resolve()
    best, kind = -1, ""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, filesystem = line.partition(" - ")
            mount = Path(fields.split()[4].replace("\\040", " "))
            if place.is_relative_to(mount) and len(mount.parts) > best:
                best, kind = len(mount.parts), filesystem.split()[0]
    return kind.startswith(_LOCAL_DISKS)
