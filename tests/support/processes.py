"""Commands under test with all that they start, so that what stays behind is seen, and never stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "distributed" / "run_group.py"
IMPORTED = [ROOT, *(ROOT / "tests" / room for room in ("support", "distributed", "trainer"))]  # by processes under test
MARK = "VEXACT_TEST_MARK"
PATIENCE_S = 500.0  # for whatever must come: it ends a hang, and says nothing of how fast the machine is
_sessions: dict[str, set[int]] = {}  # of the commands that were started with a mark
Start = Callable[..., "subprocess.Popen[str]"]


def environment(mark: str, further: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every process under test inherits; ``mark`` finds them again."""
    return {
        **os.environ,
        "PYTHONPATH": ":".join(map(str, IMPORTED)),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        MARK: mark,
        **(further or {}),
    }


def marked(mark: str) -> list[int]:
    """The living processes that inherited ``mark``, this one left out, or that are of a marked command's session: who
    changes its title may write over the mark."""
    wanted, found = f"{MARK}={mark}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            inherited = wanted in (folder / "environ").read_bytes() + b"\0"
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            of_command = int(session) in _sessions.get(mark, ()) and state != "Z"
            if int(folder.name) != os.getpid() and (inherited or of_command):
                found.append(int(folder.name))
    return found


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition has come true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def ending(mark: str) -> Iterator[None]:
    """Ends, at the end, what a failed test would leave."""
    try:
        yield
    finally:
        for pid in marked(mark):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def output_of(process: subprocess.Popen[str]) -> str:
    """All that it writes, once it has ended."""
    return process.communicate(timeout=PATIENCE_S)[0]


def start(command: list[str], mark: str, **variables: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        command,
        env=environment(mark, variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _sessions.setdefault(mark, set()).add(started.pid)
    return started


def ranks(mark: str, size: int, port: int, *arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
    """The ranks of a run that was started by hand, with torchrun's variables."""
    return [
        start(
            [sys.executable, str(SCRIPT), *arguments],
            mark,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            **variables,
        )
        for rank in range(size)
    ]


def by_ray(mark: str, *arguments: str) -> subprocess.Popen[str]:
    """A run with a Ray cluster of its own."""
    return start([sys.executable, str(SCRIPT), *arguments], mark)


def torchrun(mark: str, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return start([*launcher, str(SCRIPT), *arguments], mark)
