"""`algorithm.rollout_correction` in whole runs: no bit of an exact one changes, a mismatch is weighed and shown."""

import pytest
import torch

from vexact.config import load_config
from vexact.trainer.checkpoint import load_checkpoint
from vexact.trainer.launch import run
from vexact.trainer.resume.settings import deciding_settings
from vexact.trainer.workers import actor_config

KEY = "algorithm.rollout_correction"
NOISE = ("actor_rollout_ref.rollout.mismatch.mode=noise", "actor_rollout_ref.rollout.mismatch.scale=0.3")
RECOMPUTE = "algorithm.recompute_old_log_prob=true"
WEIGHTS = (f"{KEY}.rollout_is=sequence", f"{KEY}.rollout_is_threshold=1.5", f"{KEY}.rollout_is_batch_normalize=true")
REJECTION = (f"{KEY}.rollout_rs=token_k3,seq_mean_k1", f"{KEY}.rollout_rs_threshold=0.05,0.9_1.1")
VETO = f"{KEY}.rollout_token_veto_threshold=0.5"


def weights_after(tmp_path, name, step):
    _, state = load_checkpoint(tmp_path / name / "checkpoints" / f"step_{step}")
    return {parameter: parts["weight"].numpy().tobytes() for parameter, parts in state["parameters"].items()}


def test_an_exact_run_has_the_same_weights_with_every_correction(overrides, metrics, tmp_path):
    for name, extra in (("without", ()), ("with", (*WEIGHTS, *REJECTION, VETO))):
        more = ("trainer.total_training_steps=2", f"trainer.default_local_dir={tmp_path / name}")
        run(load_config(overrides(*more, *extra)))
    assert weights_after(tmp_path, "with", 2) == weights_after(tmp_path, "without", 2)
    for row in metrics("with"):
        assert row["rollout_corr/rollout_is_mean"] == row["rollout_corr/rollout_is_eff_sample_size"] == 1
        assert row["rollout_corr/rollout_rs_masked_fraction"] == row["rollout_corr/rollout_is_veto_fraction"] == 0


@pytest.mark.parametrize("mode", [(RECOMPUTE,), (f"{KEY}.loss_type=reinforce",)])
def test_a_mismatch_is_weighed_and_shown(overrides, metrics, mode):
    more = (*NOISE, *mode, *WEIGHTS, *REJECTION, VETO, "trainer.total_training_steps=1")
    run(load_config(overrides(*more)))
    (row,) = metrics()
    assert row["rollout_corr/k3_kl"] > 1e-4
    assert row["rollout_corr/rollout_is_eff_sample_size"] < 1
    assert row["rollout_corr/rollout_is_max"] > 1 > row["rollout_corr/rollout_is_min"]
    assert 0 < row["rollout_corr/rollout_rs_masked_fraction"] < 1
    assert row["rollout_corr/rollout_is_batch_norm_factor"] != 1
    assert row["actor/skipped_steps"] == 0


def test_every_key_reaches_the_actor(overrides):
    config = load_config(overrides(*NOISE, RECOMPUTE, *WEIGHTS, *REJECTION, VETO))
    found = actor_config(config, torch.device("cpu"), 1).correction
    assert (found.level, found.upper, found.lower, found.batch_normalize) == ("sequence", 1.5, None, True)
    assert [(r.statistic, r.upper, r.lower) for r in found.rejections] == [
        ("token_k3", 0.05, None),
        ("seq_mean_k1", 1.1, 0.9),
    ]
    assert (found.veto, found.bypass, found.weights_apply) == (0.5, False, True)
    reported = actor_config(load_config(overrides(*NOISE, f"{KEY}.bypass_mode=true", *WEIGHTS)), torch.device("cpu"), 1)
    assert (reported.correction.bypass, reported.correction.weights_apply) == (True, False)


def test_a_resumed_run_looks_at_it_only_when_it_is_on(overrides):
    off = deciding_settings(load_config(overrides(f"{KEY}.rollout_is_threshold=3.0")), "cpu", 1)
    switches = ("rollout_is", "rollout_rs", "rollout_token_veto_threshold", "loss_type")
    assert {key for key in off if key.startswith(KEY)} == {f"{KEY}.{name}" for name in switches}
    on = deciding_settings(load_config(overrides(*WEIGHTS)), "cpu", 1)
    assert on[f"{KEY}.rollout_is_threshold"] == "1.5"
