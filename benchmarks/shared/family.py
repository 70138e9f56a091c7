"""The processes that a process has started, and theirs. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Process ids, of children before theirs."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def end_family(process: subprocess.Popen) -> None:
    """Kills a process and all that descends from it: a rank that a dead launcher leaves behind would keep its GPU."""
    members = descendants(process.pid)
    process.kill()
    for pid in members:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def marked(variable: str, value: str) -> list[int]:
    """Processes that live and have this in their environment, whoever their parent is by now."""
    entry, found = f"{variable}={value}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
