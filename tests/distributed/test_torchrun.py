"""Ranks that torchrun, or a launcher like it, started."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Iterator

import processes
import pytest
from ports import free_port

from vexact import env

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture
def mark() -> Iterator[str]:
    name = uuid.uuid4().hex
    with processes.ending(name):
        yield name


@pytest.fixture
def port() -> int:
    return free_port()


def test_the_variables_of_torchrun() -> None:
    assert env.torchrun_rank({}) is None
    assert env.torchrun_rank({"RANK": "0"}) is None, "other programs set RANK, too"
    assert env.torchrun_rank(TORCHRUN) == env.TorchrunRank(1, 2, 1, "a", 29500, 0)
    for change, text in (
        ({"MASTER_PORT": " "}, "not MASTER_PORT"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    ):
        with pytest.raises(ValueError, match=text):
            env.torchrun_rank({**TORCHRUN, **change})


def test_a_run_ends_well_and_quietly(mark: str) -> None:
    run = processes.torchrun(mark, "none")
    output, _ = run.communicate(timeout=processes.PATIENCE_S)
    assert run.returncode == 0, output
    lines = output.splitlines()
    assert any(re.match(r"cpu 2 \[4.0, 4.0\] pids ", line) for line in lines)
    assert sorted(line for line in lines if line.startswith("hello")) == ["hello from 0", "hello from 1"]
    assert len([line for line in lines if not line.startswith(("cpu", "hello", "the same"))]) == 0, output
    assert processes.marked(mark) == []


def test_a_rank_that_dies_under_torchrun_is_named_by_rank_0(mark: str) -> None:
    run = processes.torchrun(mark, "kill")
    output, _ = run.communicate(timeout=processes.PATIENCE_S)
    assert run.returncode == 1
    pid = re.search(r"pids \[\d+, (\d+)\]", output)
    assert pid is not None, output
    assert f"run_group: rank 1 (host {socket.gethostname()}, pid {pid[1]}) died in update" in output
    assert processes.until(lambda: processes.marked(mark) == [])


def test_an_error_of_one_rank_is_said_once(mark: str, port: int) -> None:
    runs = processes.ranks(mark, 2, port, "broken")
    outputs = [run.communicate(timeout=processes.PATIENCE_S)[0] for run in runs]
    assert runs[0].returncode == 2
    assert runs[1].returncode in (0, -signal.SIGKILL), "as rank 0 told it, or by its signal if it was slow to hear it"
    assert outputs == ["run_group: model.path=nowhere does not exist\n", ""]
    assert processes.marked(mark) == []


def test_a_rank_that_hangs_is_named_and_ended(mark: str, port: int) -> None:
    runs = processes.ranks(mark, 2, port, "stop")
    output, _ = runs[0].communicate(timeout=processes.PATIENCE_S)
    assert runs[0].returncode == 2
    assert f"rank 1 (host {socket.gethostname()}, pid {runs[1].pid}) hangs in update" in output
    assert "has not finished in 5 s; it is stopped" in output
    assert runs[1].wait(timeout=processes.PATIENCE_S) == -signal.SIGKILL
    assert processes.marked(mark) == []


def test_rank_0_takes_the_others_with_it_and_they_heed_no_signal_before(mark: str, port: int) -> None:
    runs = processes.ranks(mark, 2, port, "wait")
    assert runs[0].stdout is not None
    while not runs[0].stdout.readline().startswith("cpu 2"):
        assert runs[0].poll() is None
    os.kill(runs[1].pid, signal.SIGTERM)
    os.kill(runs[1].pid, signal.SIGINT)
    time.sleep(0.5)
    assert runs[1].poll() is None
    os.kill(runs[0].pid, signal.SIGKILL)
    assert runs[1].wait(timeout=processes.PATIENCE_S) == 1
    assert runs[1].stdout is not None
    assert "Traceback" not in runs[1].stdout.read()
    assert processes.marked(mark) == []


def test_an_error_before_the_start_leaves_no_rank_waiting(mark: str) -> None:
    run = processes.torchrun(mark, "early")
    output, _ = run.communicate(timeout=processes.PATIENCE_S)
    assert run.returncode == 1
    assert output.count("trainer.seed=-1 is wrong") == 1
    assert "interrupted" not in output
    assert processes.until(lambda: processes.marked(mark) == [])


def test_a_port_in_use_is_named(mark: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = processes.ranks(mark, 2, taken.getsockname()[1], "none")[0]
        output, _ = run.communicate(timeout=processes.PATIENCE_S)
    assert run.returncode == 2
    message = r"run_group: MASTER_ADDR=127.0.0.1 MASTER_PORT=\d+: the port is in use on this machine"
    assert re.search(message, output), output
    assert "Traceback" not in output
