"""Each line the doctor can print about several GPUs and several machines."""

from __future__ import annotations

import os
import resource
import socket
from collections import namedtuple

import pytest
import torch

from vexact import env
from vexact.audit.doctor import machine, report, several_gpus
from vexact.audit.doctor.result import GIB

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
    "GPU0\t X \tNV18\tNV18\tSYS\t0-31\t0\n"
    "GPU1\tNV18\t X \t{link}\tSYS\t0-31\t0\n"
    "GPU2\tNV18\t{link}\t X \tPIX\t0-31\t0\n"
    "NIC0\tSYS\tSYS\tPIX\t X \n\n"
    "Legend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs that reach each other, as torch sees them."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(several_gpus, "link_kinds", lambda: {"NV18"})
    monkeypatch.setattr(env, "master_addr", lambda: "")


def lines(num_gpus, num_nodes):
    return {result.name: result for result in several_gpus.check_several(num_gpus, num_nodes)}


def test_one_gpu_of_one_machine_needs_none_of_it():
    assert lines(1, 1) == lines(0, 1) == {}


def test_what_is_looked_at(two_gpus, monkeypatch):
    common = {"shared memory", "locked memory", "host name"}
    assert lines(2, 1).keys() == common | {"nccl", "gpu links"}
    assert lines(1, 2).keys() == common | {"nccl"}
    monkeypatch.setattr(env, "master_addr", lambda: "127.0.0.1")
    assert lines(0, 2).keys() == common | {"master address"}


def test_the_report_has_these_lines_when_there_are_two_gpus(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "check_gpus", lambda: iter(()))
    found = {r.name: r for r in report.machine_checks(tmp_path, tmp_path, "cuda", False)}
    assert found["nccl"].message.startswith("2.28.3, which came with torch")
    assert found["gpu links"].message == "all 2 GPUs reach each other's memory, NVLink (links NV18)"
    assert "nccl" not in {r.name for r in report.machine_checks(tmp_path, tmp_path, "cpu", False)}


def test_no_nccl(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    result = several_gpus.check_nccl()
    assert (result.status, "without NCCL" in result.message) == ("error", True)


@pytest.mark.parametrize(
    ("reach", "kinds", "status", "part"),
    [
        (True, {"NV18"}, "ok", "NVLink (links NV18)"),
        (True, {"NV18", "SYS"}, "ok", "not all over NVLink (links NV18, SYS)"),
        (True, set(), "ok", "links unknown"),
        (False, {"PHB"}, "warning", "GPUs 1 and 2 (1 of 3 pairs) do not reach each other's memory"),
    ],
)
def test_gpu_links(monkeypatch, reach, kinds, status, part):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach or (a, b) != (1, 2))
    monkeypatch.setattr(several_gpus, "link_kinds", lambda: kinds)
    result = several_gpus.check_links(3)
    assert result.status == status
    assert part in result.message


@pytest.mark.parametrize(("link", "kinds"), [("NV18", {"NV18"}), ("PHB", {"NV18", "PHB"})])
def test_links_are_read_from_the_topology(monkeypatch, tmp_path, link, kinds):
    monkeypatch.setattr(several_gpus.shutil, "which", lambda name: None)
    assert several_gpus.link_kinds() == set()
    monkeypatch.undo()
    tool, text = tmp_path / "nvidia-smi", tmp_path / "topology"
    text.write_text(TOPOLOGY.format(link=link))
    tool.write_text(f"#!/bin/sh\ncat {text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert several_gpus.link_kinds() == kinds


@pytest.mark.parametrize(("free", "status"), [(0.06, "warning"), (8, "ok")])
def test_shared_memory(monkeypatch, tmp_path, free, status):
    usage = namedtuple("usage", "free total")
    monkeypatch.setattr(several_gpus.shutil, "disk_usage", lambda path: usage(int(free * GIB), int(free * GIB)))
    monkeypatch.setattr(several_gpus, "_SHARED_MEMORY", tmp_path)
    assert several_gpus.check_shared_memory().status == status
    monkeypatch.setattr(several_gpus, "_SHARED_MEMORY", tmp_path / "absent")
    assert several_gpus.check_shared_memory().status == "warning"


@pytest.mark.parametrize(
    ("limit", "cards", "status", "part"),
    [
        (resource.RLIM_INFINITY, 1, "ok", "no limit"),
        (8 << 20, 0, "ok", "at most 8 MiB (ulimit -l), which matters to InfiniBand only"),
        (64 << 10, 1, "warning", "at most 0.0625 MiB (ulimit -l), and there is an InfiniBand"),
    ],
)
def test_locked_memory(monkeypatch, tmp_path, limit, cards, status, part):
    for card in range(cards):
        (tmp_path / f"mlx5_{card}").touch()
    monkeypatch.setattr(several_gpus, "_INFINIBAND", tmp_path)
    monkeypatch.setattr(several_gpus.resource, "getrlimit", lambda which: (limit, limit))
    result = several_gpus.check_locked_memory()
    assert result.status == status
    assert part in result.message


@pytest.mark.parametrize(
    ("address", "num_nodes", "status", "part"),
    [
        ("10.0.0.7", 2, "ok", "node-a is 10.0.0.7"),
        ("127.0.1.1", 1, "ok", "enough for one machine"),
        ("127.0.1.1", 2, "error", "node-a is 127.0.1.1: other machines cannot connect"),
        (None, 1, "ok", "does not resolve (unknown), which is enough"),
        (None, 2, "error", "node-a does not resolve (unknown): other machines"),
    ],
)
def test_host_name(monkeypatch, address, num_nodes, status, part):
    def resolve(host):
        if address is None:
            raise socket.gaierror("unknown")
        return address

    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    result = several_gpus.check_host_name(num_nodes)
    assert result.status == status
    assert part in result.message
    master = several_gpus.check_master_address("node-b")
    assert (master.status, "MASTER_ADDR=node-b" in master.message) == ("error" if address is None else "ok", True)


def test_several_gpus_without_ray_are_a_warning(monkeypatch):
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    assert (machine.check_ray().status, machine.check_ray(several=True).status) == ("ok", "warning")
