"""`vexact train` on several ranks, forked from a process that has imported everything already, so that a start costs
little. Each rank has the environment, the command line and the signals that torchrun would give it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import planted_fault
from ports import free_port
from processes import PATIENCE_S, until

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["vexact.cli", "vexact.commands.train", "vexact.trainer.launch", "vexact.distributed.on_torchrun", "torch"]
)


@dataclass
class Run:
    """The processes of a run, by rank, and the files that their output goes to."""

    processes: list[Any]
    logs: list[Path]

    def wait(self, as_agent: bool = False) -> list[int]:
        """The exit codes by rank, negative for a signal; all processes are killed when they hang.

        ``as_agent``: as torchrun does, a rank that fails has the others end.
        """
        deadline, told = time.monotonic() + PATIENCE_S, False
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.02)
            if as_agent and not told and any(process.exitcode for process in self.processes):
                told = True
                for process in self.processes:
                    process.terminate()
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill()
        assert not late, f"rank {late} did not end within {PATIENCE_S:g} s:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def left(self) -> list[str]:
        """Command lines of what lives on after the ranks have ended, of all that they started."""
        until(lambda: not self._descendants())
        return self._descendants()

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
    port = str(free_port() if master_port is None else master_port)
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes, logs = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        logs.append(folder / f"rank_{rank}.log")
        variables = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = FORKS.Process(target=_rank, args=(variables, arguments, fault, logs[-1]))
        process.start()
        processes.append(process)
    return Run(processes, logs)


def was_refused(codes: list[int]) -> bool:
    """Rank 0 ended with a message, and the others as it told them to, or by its signal if they were slow to hear it."""
    return codes[0] == 2 and set(codes[1:]) <= {0, -signal.SIGKILL}


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
    if fault is not None and fault.kind == "SIGSTOP" and variables.get("RANK", "0") == "0":
        planted_fault.find_stopped_ranks_late()
    if fault is not None and fault.is_hidden and variables.get("RANK") == "0":
        planted_fault.hide_deaths()
    from vexact.cli import main

    sys.exit(main())
