"""A small Ray cluster for tests: one node, two CPUs, a dashboard that takes jobs."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import processes
import pytest
from ports import free_port

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """``mark``: of all its processes; ``address``: host:port; ``dashboard``: where jobs are submitted."""

    mark: str
    address: str
    dashboard: str

    def workers(self) -> list[int]:
        """Processes of actors."""
        return [pid for pid in processes.marked(self.mark) if b"ray::RayWorker" in command_of(pid)]


@contextmanager
def ray_head() -> Iterator[Head]:
    """Starts the cluster, and ends it with all its processes."""
    mark, folder = uuid.uuid4().hex, tempfile.mkdtemp(prefix="vxr-", dir="/tmp")
    port, dashboard, agent, metrics, client = (free_port() for _ in range(5))
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    with processes.ending(mark), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        running = processes.start(command, mark)
        try:
            assert processes.until(lambda: _answers(port) and _answers(dashboard)), running.poll()
            yield Head(mark, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        finally:
            running.terminate()
            running.communicate(timeout=processes.PATIENCE_S)
            shutil.rmtree(folder, ignore_errors=True)


def command_of(pid: int) -> bytes:
    """The command line of a process; empty if there is none any more."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
