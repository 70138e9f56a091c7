"""The processes that a process has started, and theirs. Linux only."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

from vexact.reward.sandbox.tree import descendants, kill_all


def end_family(process: subprocess.Popen) -> None:
    """Kills a process and all that descends from it: a rank that a dead launcher leaves behind would keep its GPU."""
    members = descendants(process.pid)
    process.kill()
    kill_all(members)
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
