"""A program that outlives the driver by a moment and ends what its Ray cluster leaves: Ray's agents, which wait for a
head that is gone, and the folder.

    python warden.py MARK FOLDER

It waits for the end of its standard input, which the driver holds open; ``MARK`` is in the environment of all that the
cluster consists of.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

PATIENCE_S = 10.0
CLEAR = 6  # looks in a row that find nobody: a process that is just being started shows no mark for a moment


def marked(mark: bytes) -> list[int]:
    """The processes that were started with the mark."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if mark in file.read():
                found.append(int(name))
    return found


def main(mark: str, folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    deadline = time.monotonic() + PATIENCE_S
    clear = 0
    while clear < CLEAR and time.monotonic() < deadline:
        left = marked(mark.encode())
        clear = 0 if left else clear + 1
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
