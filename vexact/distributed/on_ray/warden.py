"""A program that outlives the driver by a moment and ends what its Ray cluster leaves: Ray's agents, which wait for a
head that is gone, and the folder.

    python warden.py MARK FOLDER

It waits for the end of its standard input, which the driver holds open. ``MARK`` is in the environment of all that the
cluster consists of; but an agent writes its title over a part of what the system shows of it, and is then known by that
title and by the files that it holds open in ``FOLDER``.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

PATIENCE_S = 10.0
CLEAR = 6  # looks in a row that find nobody: a process that is just being started shows no mark for a moment


def members(mark: str, folder: str) -> list[int]:
    """The living processes of the cluster."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if mark.encode() in _read(name, "environ") or (_is_titled(name) and _holds_files(name, folder)):
                found.append(int(name))
    return found


def _read(name: str, what: str) -> bytes:
    with open(f"/proc/{name}/{what}", "rb") as file:
        return file.read()


def _is_titled(name: str) -> bool:
    return _read(name, "cmdline").startswith(b"ray::")


def _holds_files(name: str, folder: str) -> bool:
    files = f"/proc/{name}/fd"
    return bool(folder) and any(_target(f"{files}/{number}").startswith(f"{folder}/") for number in os.listdir(files))


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed since
        return ""


def main(mark: str, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    deadline = time.monotonic() + PATIENCE_S
    clear = 0
    while clear < CLEAR and time.monotonic() < deadline:
        left = members(mark, folder)
        clear = 0 if left else clear + 1
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
