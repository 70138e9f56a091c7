"""A strict run that fails its audit or its self-test leaves a diagnosis."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from vexact.audit import ExactnessError
from vexact.audit.certificate import CertificateError
from vexact.audit.compare import compare
from vexact.audit.explain import replay
from vexact.config import load_config
from vexact.distributed import WorkerError
from vexact.models.opset import set_ops
from vexact.ops import stock
from vexact.rollout import SamplingParams
from vexact.trainer.launch import run
from vexact.trainer.step import diagnose as diagnose_module
from vexact.trainer.step.collect import Collector
from vexact.trainer.workers import build as workers_module
from vexact.trainer.workers.groups import ActorGroup, EngineGroup
from vexact.types import Sample


@pytest.fixture
def stock_norm(monkeypatch):
    """A stock norm in the rollout, put there after the self-test at the start."""
    collect = Collector.collect

    def planted(self, *args):
        model = self.workers.engine.model
        set_ops(model, dataclasses.replace(model.ops, rms_norm=stock.rms_norm))
        return collect(self, *args)

    monkeypatch.setattr(Collector, "collect", planted)


@pytest.fixture
def stock_norm_from_the_start(monkeypatch):
    """A stock norm in the rollout before the self-test."""
    build = workers_module.build_engine

    def planted(*args):
        engine = build(*args)
        set_ops(engine.model, dataclasses.replace(engine.model.ops, rms_norm=stock.rms_norm))
        return engine

    monkeypatch.setattr(workers_module, "build_engine", planted)


def test_a_failed_self_test_is_diagnosed_too(overrides, stock_norm_from_the_start, tmp_path):
    with pytest.raises(CertificateError, match=r"first divergence: operator: rms_norm of layers\.0") as caught:
        run(load_config(overrides()))
    message, file = str(caught.value), tmp_path / "run" / "divergence.pt"
    assert message.startswith("the self-test before the first step failed")
    assert message.endswith(f"repeat it with: vexact verify --replay {file}")
    text = (tmp_path / "run" / "divergence.txt").read_text()
    assert text.strip() in message
    assert replay(file).describe().splitlines()[:-1] == text.splitlines()


def test_the_error_names_the_operator_and_the_file_repeats_it(overrides, stock_norm, tmp_path):
    with pytest.raises(ExactnessError, match=r"first divergence: operator: rms_norm of layers\.0") as caught:
        run(load_config(overrides("data.max_response_length=24")))
    assert "rollout and trainer disagree" in str(caught.value)
    text = (tmp_path / "run" / "divergence.txt").read_text()
    assert text.strip() in str(caught.value)
    again = replay(tmp_path / "run" / "divergence.pt")
    assert "reproduced: same place" in again.describe()
    assert again.describe().splitlines()[:-1] == text.splitlines()


def test_a_diagnosis_that_fails_does_not_hide_the_error(overrides, stock_norm, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(diagnose_module, "explain", broken)
    with pytest.raises(ExactnessError, match="rollout and trainer disagree"):
        run(load_config(overrides("data.max_response_length=24")))
    assert "no diagnosis" in caplog.text


class HungGroup:
    """Two workers that know what they run, and never answer when asked to explain."""

    size, infos = 2, ("rank 0", "rank 1")

    def __init__(self):
        self.deadlines = []

    def call(self, method, *args, timeout_s=None, **where):
        self.deadlines.append(timeout_s)
        if method == "explain":
            raise WorkerError("rank 1 has hung", rank=1, stage="the diagnosis")
        return [{}]


def test_a_group_that_hangs_in_the_diagnosis_does_not_hide_the_error(tmp_path, caplog):
    engine, actor, group = object.__new__(EngineGroup), object.__new__(ActorGroup), HungGroup()
    engine._ranks, engine._generated, engine.weights_version = [0, 1], {"a": (1, 0)}, 0
    engine._group, actor.ranks, actor._trained = group, [0, 1], {}
    logprobs = np.zeros(2, np.float32)
    sample = Sample("a", (1,), (2, 3), logprobs, logprobs, 1.0, "length", weights_version=0)
    error = ExactnessError(compare([sample], [logprobs + 1]))
    message = str(error)
    workers = SimpleNamespace(group=group, engine=engine, actor=actor, wake=lambda version: None)
    diagnose_module.diagnose(error, sample, SamplingParams(), workers, tmp_path, "model")
    assert str(error) == message
    assert "rank 1 has hung" in caplog.text
    assert len(group.deadlines) == 2
    assert None not in group.deadlines
