"""``algorithm.recompute_old_log_prob``: in an exact run it changes no bit, in another one it makes the ratio 1."""

import numpy as np
import pytest

from vexact.config import load_config
from vexact.trainer.checkpoint import load_checkpoint
from vexact.trainer.launch import run
from vexact.training import Actor

ON = "algorithm.recompute_old_log_prob=true"
NOISE = ("actor_rollout_ref.rollout.mismatch.mode=noise", "actor_rollout_ref.rollout.mismatch.scale=0.05")


def state_after(tmp_path, name):
    _, state = load_checkpoint(tmp_path / name / "checkpoints" / "step_2")
    return {
        (parameter, part): value.numpy().tobytes()
        for parameter, parts in state["parameters"].items()
        for part, value in parts.items()
        if part != "num_steps"
    }


def test_an_exact_run_has_the_same_weights_and_moments_with_it(overrides, metrics, tmp_path):
    more = ("actor_rollout_ref.actor.ppo_mini_batch_size=2", "trainer.total_training_steps=2")
    for name, extra in (("without", ()), ("with", (ON,))):
        run(load_config(overrides(*more, *extra, f"trainer.default_local_dir={tmp_path / name}")))
    assert state_after(tmp_path, "with") == state_after(tmp_path, "without")
    for row in metrics("with"):
        assert 0 < row["timing_s/old_log_prob"] < row["timing_s/step"]
        assert row["bitwise/tokens_different"] == 0
    assert all("timing_s/old_log_prob" not in row for row in metrics("without"))


def test_a_rollout_that_is_not_exact_is_still_reported_and_the_ratio_is_one(overrides, metrics, tmp_path):
    more = (*NOISE, "trainer.exactness=warn", "trainer.total_training_steps=1")
    run(load_config(overrides(*more, f"trainer.default_local_dir={tmp_path / 'without'}")))
    run(load_config(overrides(*more, ON, f"trainer.default_local_dir={tmp_path / 'with'}")))
    (without,), (with_it,) = metrics("without"), metrics("with")
    assert with_it["bitwise/tokens_different"] == without["bitwise/tokens_different"] > 0
    assert with_it["actor/ppo_kl"] == 0 != without["actor/ppo_kl"]


def test_the_kl_in_the_reward_takes_them_too(overrides, metrics):
    more = ("algorithm.use_kl_in_reward=true", "trainer.exactness=warn", "trainer.total_training_steps=1")
    run(load_config(overrides(*NOISE, *more, ON)))
    (row,) = metrics()
    assert row["actor/reward_kl_penalty"] == 0, "the policy is still the reference, whatever the rollout reported"


def test_one_that_is_no_number_is_named(overrides, monkeypatch):
    scored = Actor.logprobs

    def broken(self, sequences, *rest):
        values = scored(self, sequences, *rest)
        if all(not s.advantages.any() for s in sequences) and sequences[0].sample.request_id.startswith("step1"):
            values[3] = np.full_like(values[3], np.nan)
        return values

    monkeypatch.setattr(Actor, "logprobs", broken)
    with pytest.raises(ValueError, match=r"request step1-\S+, response position 0: the trainer gives token .*nan"):
        run(load_config(overrides(ON)))
