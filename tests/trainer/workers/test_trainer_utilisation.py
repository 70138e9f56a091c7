"""perf/mfu/actor and perf/…_gb: right where they are there, absent where nobody knows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vexact.config import load_config
from vexact.models import ModelConfig
from vexact.models.flops import training_flops
from vexact.trainer.launch import run
from vexact.trainer.step.mfu import UpdateUtilisation
from vexact.trainer.workers.build import Workers
from vexact.trainer.workers.groups import ActorGroup, EngineGroup
from vexact.trainer.workers.peak_flops import peak_flops
from vexact.types import Sample, TrainSequence

GPU = torch.device("cuda", 0)


def sequence(prompt: int, response: int) -> TrainSequence:
    values = np.zeros(response, np.float32)
    sample = Sample("r", (1,) * prompt, (5,) * response, values, values, 1.0, "stop", 0)
    return TrainSequence(sample, values)


def workers_with(actor) -> Workers:
    workers = object.__new__(Workers)
    workers.actor, workers.group = actor, None
    return workers


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H200", "float16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16", None),
        ("NVIDIA A10G", "bfloat16", None),
    ],
)
def test_the_peak_is_that_of_the_very_name(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, dtype) == peak
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_utilisation_is_operations_over_what_could_have_been_done(overrides, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = load_config(overrides("actor_rollout_ref.actor.ppo_epochs=2"))
    settings = SimpleNamespace(dtype="bfloat16")
    workers = workers_with(SimpleNamespace(ranks=SimpleNamespace(device=GPU), config=settings))
    found = UpdateUtilisation(config, workers).metrics([sequence(3, 2), sequence(4, 1)], 0.5)
    flops = training_flops(ModelConfig.from_hf_dir(config.model.path), [(3, 2), (4, 1)])
    assert found == {"perf/mfu/actor": pytest.approx(2 * flops / (0.5 * 989.4e12))}


def test_several_gpus_add_up_unless_one_is_not_known(overrides):
    config, peaks = load_config(overrides()), [1e12, 3e12]
    actor = object.__new__(ActorGroup)
    actor.ranks = [0, 1]
    actor._group = SimpleNamespace(call=lambda method, ranks, stage: {"peak_flops": list(peaks)}[method])
    workers = workers_with(actor)
    assert workers.peak_flops() == 4e12
    peaks[1] = None
    assert workers.peak_flops() is None
    assert UpdateUtilisation(config, workers).metrics([sequence(3, 2)], 1.0) == {}


def test_memory_is_that_of_the_rank_with_most():
    results = [
        {"timing_s/weights_cast": 1.0, "perf/max_memory_allocated_gb": 2.0, "perf/cpu_memory_used_gb": 9.0},
        {"timing_s/weights_cast": 3.0, "perf/max_memory_allocated_gb": 5.0, "perf/cpu_memory_used_gb": 7.0},
        {"perf/max_memory_allocated_gb": 4.0, "perf/max_memory_reserved_gb": 6.0, "perf/num_alloc_retries": 2.0},
        {"perf/num_alloc_retries": 0.0},
    ]
    workers = workers_with(None)
    workers.group = SimpleNamespace(call=lambda method, version, keep, stage: results)
    workers.engine = object.__new__(EngineGroup)
    assert workers.sync_weights(4) == {
        "timing_s/weights_cast": 1.0,
        "perf/max_memory_allocated_gb": 5.0,
        "perf/max_memory_reserved_gb": 6.0,
        "perf/num_alloc_retries": 2.0,
        "perf/cpu_memory_used_gb": 9.0,
    }
    assert workers.engine.weights_version == 4


@pytest.mark.gpu
def test_a_run_on_a_gpu_says_both(overrides, metrics):
    assert run(load_config(overrides("trainer.device=cuda", "trainer.total_training_steps=2"))) == 0
    last = metrics()[-1]
    assert 0 < last["perf/max_memory_allocated_gb"] <= last["perf/max_memory_reserved_gb"]
    known = peak_flops(GPU, "bfloat16") is not None
    assert last["perf/num_alloc_retries"] == 0
    assert ("perf/mfu/actor" in last) == known
    assert 0 < last.get("perf/mfu/actor", 0.5) < 1
