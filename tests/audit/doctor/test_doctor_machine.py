"""Each error and warning the doctor can print about software and hardware."""

from __future__ import annotations

import os
import socket
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from vexact import env
from vexact.audit.doctor import machine, packages
from vexact.audit.doctor.report import machine_checks, summary
from vexact.audit.doctor.result import GIB, error, ok


def test_a_healthy_machine_has_no_error(tmp_path):
    results = list(machine_checks(tmp_path / "run", tmp_path / "cache", "cpu", wants_wandb=False))
    assert [str(result) for result in results if result.status == "error"] == []
    assert {result.name for result in results} >= {"python", "package torch", "memory", "port", "ray", "wandb"}


def test_a_line_names_status_and_fix():
    assert str(error("disk", "full", "free some")) == "error    disk: full; fix: free some"
    assert str(ok("disk", "fine")) == "ok       disk: fine"
    assert summary([ok("a", ""), error("b", "", "")]) == "2 checks: 1 ok, 0 warning, 1 error"


def test_python_out_of_range(monkeypatch):
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.9.1")
    result = packages.check_python()
    assert result.status == "error"
    assert "3.9.1 is outside" in result.message


def test_a_checkout_that_is_not_installed_knows_its_ranges(monkeypatch):
    monkeypatch.setattr(packages, "_PACKAGE", "no-such-package")
    assert packages.check_python().status == "ok"
    plain = {result.name for result in packages.check_packages(cuda=False)}
    assert {"package torch", "package jinja2"} <= plain
    assert "package triton" not in plain
    assert "package triton" in {result.name for result in packages.check_packages(cuda=True)}


@pytest.mark.parametrize("text", [None, '[project]\nname = "another"\nrequires-python = ">=3.8"\n'])
def test_without_metadata_and_repository_no_range_is_known(monkeypatch, tmp_path, text):
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(packages, "_PACKAGE", "no-such-package")
    monkeypatch.setattr(packages, "_PYPROJECT", tmp_path / "pyproject.toml")
    assert packages.check_python().status == "warning"
    assert list(packages.check_packages(cuda=True)) == []


@pytest.mark.parametrize(("found", "part"), [(None, "not installed"), ("1.9", "1.9 is outside >=2.11")])
def test_package_absent_or_out_of_range(monkeypatch, found, part):
    monkeypatch.setattr(packages, "installed_version", lambda name: found)
    result = packages.check_package(Requirement("torch>=2.11"))
    assert (result.status, result.fix) == ("error", 'pip install "torch>=2.11"')
    assert part in result.message


def test_a_local_build_counts_as_its_release(monkeypatch):
    monkeypatch.setattr(packages, "installed_version", lambda name: "2.13.0+cu130")
    assert packages.check_package(Requirement("torch>=2.11")).status == "ok"


def test_triton_is_required_with_a_gpu_and_an_old_optional_package_is_a_warning(monkeypatch):
    declared = ["torch>=2.11", 'triton>=3.6; extra == "gpu"', 'wandb>=0.20; extra == "wandb"']
    monkeypatch.setattr(packages, "_requirements", lambda: declared)
    monkeypatch.setattr(packages, "installed_version", lambda name: {"torch": "2.12", "wandb": "0.1"}.get(name))
    lines = {result.name: result.status for result in packages.check_packages(cuda=True)}
    assert lines == {"package torch": "ok", "package triton": "error", "package wandb": "warning"}
    assert "package triton" not in {result.name for result in packages.check_packages(cuda=False)}


@pytest.mark.parametrize(("built", "part"), [(None, "built without CUDA"), ("13.0", "cannot use it")])
def test_a_driver_that_torch_does_not_use(monkeypatch, built, part):
    monkeypatch.setattr(machine, "driver_version", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    (result,) = machine.check_gpus()
    assert result.status == "error"
    assert part in result.message


@pytest.mark.parametrize(
    ("capability", "free", "status"), [((7, 5), 70, "error"), ((9, 0), 2, "warning"), ((9, 0), 70, "ok")]
)
def test_gpu_age_and_memory(monkeypatch, capability, free, status):
    major, minor = capability
    properties = SimpleNamespace(name="GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, 80 * GIB))
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    results = list(machine.check_gpus())
    assert [(result.name, result.status) for result in results] == [("gpu 0", status), ("gpu 1", status)]
    assert f"GPU, {free} of 80 GiB free, sm_{major}{minor}" in results[0].message


@pytest.mark.parametrize(("free", "status"), [(0.5, "error"), (2, "warning"), (64, "ok")])
def test_host_memory(monkeypatch, free, status):
    monkeypatch.setattr(machine, "available_memory", lambda: int(free * GIB))
    assert machine.check_memory().status == status


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    monkeypatch.setattr(machine, "_CGROUP_LIMIT", tmp_path / "memory.max")
    assert machine.available_memory() == 2 << 20


@pytest.mark.parametrize(("free", "status"), [(0.2, "error"), (5, "warning"), (500, "ok")])
def test_disk_room(monkeypatch, tmp_path, free, status):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(int(free * GIB)))
    assert machine.check_disk("disk", tmp_path / "not" / "yet").status == status


def test_disk_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in machine.check_disk("disk", tmp_path).message
    (tmp_path / "file").touch()
    monkeypatch.undo()
    assert machine.check_disk("disk", tmp_path / "file" / "below").status == "error"


def test_no_port(monkeypatch):
    def refuse(*args):
        raise PermissionError("not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    result = machine.check_port()
    assert (result.status, "not permitted" in result.message) == ("error", True)


@pytest.mark.parametrize(
    ("version", "mode", "status", "part"),
    [
        (None, "nonsense", "ok", "does not matter"),
        ("2.55", "nonsense", "error", "RAY_AUTH_MODE=nonsense is unknown"),
        ("2.55", "disabled", "warning", "can run code"),
        ("2.55", "", "ok", "token (its default)"),
    ],
)
def test_ray(monkeypatch, version, mode, status, part):
    monkeypatch.setattr(machine, "installed_version", lambda name: version)
    monkeypatch.setattr(env, "ray_auth_mode", lambda: mode)
    result = machine.check_ray()
    assert result.status == status
    assert part in result.message


@pytest.mark.parametrize(
    ("version", "mode", "key", "wanted", "status"),
    [
        ("0.30", "sometimes", False, False, "error"),
        (None, "", False, True, "error"),
        (None, "", False, False, "ok"),
        ("0.30", "online", False, True, "warning"),
        ("0.30", "", True, True, "ok"),
    ],
)
def test_wandb(monkeypatch, version, mode, key, wanted, status):
    environ = {"WANDB_MODE": mode, "WANDB_API_KEY": "secret" if key else ""}
    real_mode = env.wandb_mode
    monkeypatch.setattr(env, "wandb_mode", lambda: real_mode(environ))
    monkeypatch.setattr(env, "has_wandb_key", lambda: key)
    monkeypatch.setattr(machine, "installed_version", lambda name: version)
    result = machine.check_wandb(wanted)
    assert result.status == status
    assert "secret" not in str(result)


@pytest.mark.parametrize(
    ("settings", "running", "status"),
    [
        (("many", ""), 1, "error"),
        (("0", ""), 1, "error"),
        (("", ""), 100_000, "warning"),
        (("1", "active"), 1, "warning"),
        (("1", "PASSIVE"), 1, "ok"),
    ],
)
def test_threads(monkeypatch, settings, running, status):
    monkeypatch.setattr(env, "omp_settings", lambda: settings)
    monkeypatch.setattr(torch, "get_num_threads", lambda: running)
    assert machine.check_threads().status == status


def test_environment_readers():
    environ = {"RAY_AUTH_MODE": "token", "WANDB_API_KEY": "x", "OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert env.ray_auth_mode(environ) == "token"
    assert env.has_wandb_key(environ)
    assert env.omp_settings(environ) == ("3", "ACTIVE")
    assert (env.ray_auth_mode({}), env.has_wandb_key({}), env.omp_settings({})) == ("", False, ("", ""))


def test_driver_version_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.driver_version() is None
    tool = Path(tmp_path / "nvidia-smi")
    tool.write_text("#!/bin/sh\necho 570.133.20\necho 570.133.20\n")
    tool.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.driver_version() == "570.133.20"
