"""Rollouts and training sides of other packages: found by entry points, named when they are not there."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from foreign_rollout import register

from vexact import plugins
from vexact.audit.verify.sides import load_side


def load(name: str):
    return plugins.load(plugins.ROLLOUTS, name, "actor_rollout_ref.rollout.name", ("vexact",))


def test_a_name_that_nobody_provides_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(register(tmp_path, nudged="foreign_rollout"))
    with pytest.raises(
        ValueError, match=r"rollout\.name=sgl: no installed package provides it; there is vexact, nudge"
    ):
        load("sgl")
    with pytest.raises(ValueError, match=r"did you mean nudged\?"):
        load("nudge")


def test_a_bridge_of_this_project_says_how_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    with pytest.raises(ValueError, match=r"name=vllm: .*there is vexact\. .*pip install 'submodules/vllm\[cpu\]'"):
        load("vllm")
    with pytest.raises(
        ValueError, match=r"--model_backend=veomni: .*there is vexact, hf\. .*pip install submodules/veo"
    ):
        load_side("veomni", Path("x"), torch.float32, torch.device("cpu"), "triton-invariant")
    with pytest.raises(ValueError, match=r"did you mean vllm\?"):
        load("vlm")


def test_two_packages_of_one_name_are_refused_and_one_found_twice_is_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(register(tmp_path / "a", package="one", nudged="foreign_rollout"))
    monkeypatch.syspath_prepend(register(tmp_path / "b", package="one", nudged="foreign_rollout"))
    assert load("nudged").build is not None
    monkeypatch.syspath_prepend(register(tmp_path / "c", package="two", nudged="foreign_rollout"))
    with pytest.raises(ValueError, match=r"(one|two) 1\.0 and (one|two) 1\.0 both provide it"):
        load("nudged")


def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    (tmp_path / "broken_rollout.py").write_text("raise RuntimeError('needs another card')\n")
    monkeypatch.syspath_prepend(register(tmp_path, broken="broken_rollout", gone="no_such_module:build", empty="json"))
    with pytest.raises(
        ValueError, match=r"elsewhere 1\.0 provides it as broken_rollout, .*RuntimeError: needs another"
    ):
        load("broken")
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        load("gone")
    with pytest.raises(ValueError, match=r"is no rollout: it has no check and no build\(\)"):
        plugins.load_rollout("empty")


def test_a_training_side_of_another_package(tmp_path, monkeypatch):
    (tmp_path / "other_side.py").write_text("def load_side(*given):\n    return given\n")
    register(tmp_path, group="vexact.verify_backends", other="other_side:load_side")
    monkeypatch.syspath_prepend(tmp_path)
    given = (Path("model"), torch.float32, torch.device("cpu"), "triton-invariant")
    assert load_side("other", *given) == given
