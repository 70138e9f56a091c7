"""A rollout of another package in our trainer: alone and on ranks of its own, never under strict."""

import os
from pathlib import Path

import pytest
from foreign_rollout import register
from run_results import rows
from test_trainer_ranks import arguments, torchrun

from vexact.config import ConfigError, load_config
from vexact.config.plan import build_plan
from vexact.trainer.launch import run
from vexact.weights import WeightSyncError

SUPPORT = Path(__file__).resolve().parents[2] / "support"
STEPS = 2


@pytest.fixture
def nudged(tmp_path, monkeypatch):
    """The directory that provides it."""
    directory = register(tmp_path / "packages", nudged="foreign_rollout")
    monkeypatch.syspath_prepend(directory)
    return directory


def settings(tiny, directory, *more):
    return arguments(
        tiny, directory, "actor_rollout_ref.rollout.name=nudged", f"trainer.total_training_steps={STEPS}", *more
    )


def assert_mismatch(directory):
    found = rows(directory)
    assert len(found) == STEPS
    for row in found:
        assert row["rollout/num_tokens"] > row["bitwise/tokens_compared"] > 0  # that of the first mini-batch
        assert row["bitwise/tokens_different"] == row["bitwise/tokens_compared"]
        assert 0 < row["training/rollout_probs_diff_max"] < 1e-6
        assert row["rollout/weights_bytes"] > 0
        assert "rollout/kv_usage" not in row
        assert "bitwise/tokens_redrawn" not in row
    assert not (directory / "certificate.json").exists()


def test_it_generates_what_our_trainer_trains_on(nudged, tiny, tmp_path):
    config = load_config(settings(tiny, tmp_path / "run"))
    assert config.trainer.exactness == "warn"
    plan = build_plan(config, "cpu").text()
    assert "that of nudged (rollout), triton-invariant (trainer)" in plan
    assert "rollout.name=nudged cannot be exact, so trainer.exactness is warn" in plan
    assert "set trainer.exactness=strict" not in plan
    assert run(config) == 0
    assert_mismatch(tmp_path / "run")


def test_on_ranks_of_its_own_it_gets_whole_weights(nudged, tiny, tmp_path):
    paths = os.pathsep.join([str(nudged), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    torchrun(3, settings(tiny, tmp_path / "run", "trainer.rollout_gpus=1"), PYTHONPATH=paths)
    assert_mismatch(tmp_path / "run")


@pytest.mark.parametrize(("fault", "message"), [("keep", "still has the old"), ("late", "says that it has version -1")])
def test_weights_that_did_not_arrive_stop_the_run(nudged, tiny, tmp_path, monkeypatch, fault, message):
    monkeypatch.setenv("FAULT", fault)
    config = load_config(settings(tiny, tmp_path / "run"))
    with pytest.raises(WeightSyncError, match=message):
        run(config)


def test_strict_is_refused_and_so_is_what_it_does_not_honour(nudged, tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"exactness=strict: .*rollout\.name=nudged samples with other.*set .*=warn"):
        load_config(settings(tiny, tmp_path / "run", "trainer.exactness=strict"))
    with pytest.raises(ConfigError, match="top_k=5: nudged does not have it"):
        load_config(settings(tiny, tmp_path / "run", "actor_rollout_ref.rollout.top_k=5"))


def test_a_rollout_that_is_not_installed_is_named_before_anything_is_read(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.name=nudged: no installed package provides it; there is vexact"):
        load_config(settings(tiny, tmp_path / "run"))
