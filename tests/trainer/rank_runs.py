"""`vexact train` on several ranks, forked from a process that has imported everything already, so that a start costs
little. Each rank has the environment, the command line and the signals that torchrun would give it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import planted_fault

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["vexact.cli", "vexact.commands.train", "vexact.trainer.launch", "vexact.distributed.on_torchrun", "torch"]
)


@dataclass
class Run:
    """The processes of a run, by rank, and the files that their output goes to."""

    processes: list[Any]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = 60.0, as_agent: bool = False) -> list[int]:
        """The exit codes by rank, negative for a signal; all processes are killed when they take longer.

        ``as_agent``: as torchrun does, a rank that fails has the others end.
        """
        deadline, told = time.monotonic() + timeout_s, False
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
            if as_agent and not told and any(process.exitcode for process in self.processes):
                told = True
                for process in self.processes:
                    process.terminate()
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill()
        assert not late, f"rank {late} did not end within {timeout_s:g} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def left(self, patience_s: float = 5.0) -> list[str]:
        """Command lines of what lives on a moment after the ranks have ended, of all that they started."""
        deadline = time.monotonic() + patience_s
        while (found := self._descendants()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _descendants(self) -> list[str]:
        sessions, found = {process.pid for process in self.processes}, []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in sessions and state != "Z":
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found


def start(
    folder: Path,
    arguments: list[str],
    ranks: int = 2,
    fault: planted_fault.Fault | None = None,
    master_port: int | None = None,
) -> Run:
    """A run of ``ranks`` processes whose output goes into ``folder``.

    One process is a run without a launcher; a fault on another rank than 0 is then one of the workers that it starts.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] if master_port is None else master_port
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, logs = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        logs.append(folder / f"rank_{rank}.log")
        variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = FORKS.Process(target=_rank, args=(variables, arguments, fault, logs[-1]))
        process.start()
        processes.append(process)
    return Run(processes, logs)


def _rank(variables: dict[str, str], arguments: list[str], fault: planted_fault.Fault | None, log: Path) -> None:
    os.setsid()
    os.environ |= {"OMP_NUM_THREADS": "1"} | variables
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.argv = ["vexact", "train", *arguments]
    if fault is not None and fault.rank == int(variables.get("RANK", "0")):
        fault.plant()
    elif fault is not None and not variables:
        planted_fault.plant_in_workers(fault)
    from vexact.cli import main

    sys.exit(main())
