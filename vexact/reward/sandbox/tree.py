"""Ending everything that a process started, in whatever session and however often it forked."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress


def descendants(root: int) -> list[int]:
    """Process ids below ``root`` by ``/proc``; empty where there is none."""
    children: dict[int, list[int]] = {}
    try:
        numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for number in numbers:
        try:
            with open(f"/proc/{number}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(number)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def has_living(root: int) -> bool:
    """Whether a process below ``root`` has not ended yet."""
    for number in descendants(root):
        with suppress(OSError), open(f"/proc/{number}/stat", "rb") as file:
            if file.read().rpartition(b")")[2].split()[0] != b"Z":
                return True
    return False


def end_descendants(seconds: float = 5.0) -> None:
    """Kill and reap all below this process, which must have adopted orphans; a child that keeps forking loses the race
    because its parents are killed with it, and each round sees what the last one missed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        kill_all(descendants(os.getpid()))
        if not _reap():
            return
        time.sleep(0.001)


def kill_all(numbers: list[int]) -> None:
    """SIGKILL to each that still exists."""
    for number in numbers:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGKILL)


def _reap() -> bool:
    """Collect children that have ended; False when none is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
