"""Workers as Ray actors, of one small cluster that all tests share, and of one that a run starts itself."""

from __future__ import annotations

import os
import re
import socket
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import dummy_worker
import numpy as np
import processes
import pytest
from ray_head import RAY, Head, command_of, ray_head

from vexact.distributed import ClusterError, Layout, WorkerError, resolve_layout, start_workers
from vexact.distributed.on_ray import connect
from vexact.distributed.on_ray import start as start_module

HOST = socket.gethostname()


def _layout(head: Head, size: int = 2) -> Layout:
    return Layout(n_gpus_per_node=size, device="cpu", ray_address=head.address)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


def test_calls_reach_the_ranks_and_what_they_print_reaches_the_console(
    head: Head, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout = resolve_layout(_layout(head))
    assert (layout.world_size, layout.transport, layout.device) == (2, "ray", "cpu")
    with start_workers(layout, dummy_worker.make, timeout_s=processes.PATIENCE_S) as group:
        assert [(info.rank, info.local_rank, info.node, info.host) for info in group.infos] == [
            (0, 0, 0, HOST),
            (1, 1, 0, HOST),
        ]
        assert group.call("who") == list(group.infos)
        assert group.call("folder") == [str(tmp_path)] * 2, "relative paths mean the same, wherever Ray was started"
        assert len(head.workers()) == 2
        array = np.zeros(3)
        assert [values.tolist() for values in group.call("add", array, more=0.5)] == [[0.5] * 3, [1.5] * 3]
        assert not array.any()
        assert group.call("total", 2.0) == [4.0, 4.0]
        slow = group.start("wait_for", str(tmp_path / "go on"), ranks=[1])
        assert group.start_each("add", [(array,)], ranks=[0]).result()[0].tolist() == [0.0] * 3
        assert not slow.done()
        (tmp_path / "go on").touch()
        assert slow.result() == [None]
        group.call("say", "hello from")
        printed: list[str] = []
        assert processes.until(lambda: _all_said(capfd, printed)), printed
    assert sorted(line for line in printed if "hello" in line) == ["[rank 0] hello from 0", "[rank 1] hello from 1"]
    assert len([line for line in printed if "the same everywhere" in line]) == 1, "what both say is said once"
    assert [line for line in printed if not line.startswith("[rank ")] == []
    assert processes.until(lambda: head.workers() == [])


def _all_said(capfd: pytest.CaptureFixture[str], printed: list[str]) -> bool:
    printed += "".join(capfd.readouterr()).splitlines()
    return sum("hello" in line for line in printed) == 2 and any("everywhere" in line for line in printed)


def _free_cpus(head: Head) -> float:
    cluster = connect(head.address, 0, 0)
    try:
        return float(cluster.ray.available_resources().get("CPU", 0))
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("broken", ValueError, "model.path=nowhere does not exist"),
        ("kill", WorkerError, r"rank 1 \(host .*\) died in update: its process is gone"),
        ("stop", WorkerError, r"rank 1 \(host .*\) hangs in update: the process does not answer .* 5 s"),
    ],
)
def test_what_goes_wrong_is_named_and_everything_ends(head: Head, kind: str, error: type, text: str) -> None:
    make = partial(dummy_worker.make, broken=kind == "broken")
    with pytest.raises(error, match=text), start_workers(_layout(head), make, timeout_s=processes.PATIENCE_S) as group:
        group.call("fail", 1, kind, timeout_s=5.0, stage="update")
    assert processes.until(lambda: head.workers() == [])


def test_more_workers_than_the_cluster_has_room_for(head: Head) -> None:
    assert processes.until(lambda: _free_cpus(head) == 2), "Ray hears late of what has ended"
    with pytest.raises(ClusterError) as caught:
        start_workers(_layout(head, 3), dummy_worker.make, start_timeout_s=1.0)
    text = str(caught.value)
    assert "1 node(s) with 3 free CPU(s) each (trainer.nnodes, trainer.n_gpus_per_node)" in text
    assert f"the cluster has 1 node(s): {HOST} 2 CPU(s); 2 free in all" in text


def test_unequal_versions_are_refused(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    own = start_module.versions()
    monkeypatch.setattr(start_module, "versions", lambda: replace(own, vexact="0.0 (source 0)"))
    with pytest.raises(ClusterError, match=r"rank 0 .* has vexact .*, the driver 0.0 \(source 0\); install the same"):
        start_workers(_layout(head), dummy_worker.make, timeout_s=processes.PATIENCE_S)
    assert processes.until(lambda: head.workers() == [])


def test_a_submitted_job_uses_the_cluster_and_ends_well(head: Head) -> None:
    entry = [sys.executable, str(processes.SCRIPT), "none", "--size=2"]
    job = processes.start([RAY, "job", "submit", f"--address={head.dashboard}", "--", *entry], head.mark)
    output, _ = job.communicate(timeout=processes.PATIENCE_S)
    assert job.returncode == 0, output
    assert "cpu 2 [4.0, 4.0] pids" in output
    assert re.search(rf"joined the Ray cluster at [\d.]+:{head.address.split(':')[1]}\n", output), output
    assert "Traceback" not in output


def test_the_job_script_passes_arguments_on_and_fails_with_its_job(head: Head) -> None:
    script = processes.ROOT / "examples" / "multinode" / "ray_job.sh"
    path = str(Path(RAY).parent)
    job = processes.start(
        ["bash", str(script), "data.train_file=a b?c=1&d;$HOME*"],
        head.mark,
        RAY_API=head.dashboard,
        NNODES="1",
        PATH=f"{path}:{os.environ['PATH']}",
    )
    output, _ = job.communicate(timeout=processes.PATIENCE_S)
    assert job.returncode != 0, output
    last = "\n".join(output.splitlines()[-8:])
    assert "data.train_file" in last, output
    assert "a b?c=1&d;$HOME*" in output
    assert "trainer.nnodes=1" in output


def test_a_cluster_of_ones_own_ends_with_its_driver() -> None:
    mark = uuid.uuid4().hex
    with processes.ending(mark):
        command = [sys.executable, str(processes.SCRIPT), "die", "--size=2"]
        driver = processes.start(command, mark, RAY_AUTH_MODE="", HOME="/nowhere")  # it has a token of its own
        output, _ = driver.communicate(timeout=processes.PATIENCE_S)
        assert driver.returncode == -9, output
        assert "cpu 2 [4.0, 4.0] pids" in output
        assert processes.until(lambda: processes.marked(mark) == []), [
            command_of(pid) for pid in processes.marked(mark)
        ]
