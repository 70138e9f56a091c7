"""The mismatch dial reaches the rollout of a training run, and its audit sees it."""

from __future__ import annotations

from vexact.config import load_config
from vexact.trainer.launch import run

DIAL = "actor_rollout_ref.rollout.mismatch"


def test_noise_in_the_rollout_is_counted_and_the_run_goes_on(overrides, metrics):
    config = load_config(overrides(f"{DIAL}.mode=noise", f"{DIAL}.scale=0.01", "trainer.total_training_steps=1"))
    assert run(config) == 0
    (row,) = [row for row in metrics() if "bitwise/tokens_different" in row]
    assert row["bitwise/tokens_different"] > 0.9 * row["bitwise/tokens_compared"]
    assert 1e-3 < row["bitwise/max_abs_logprob_diff"] < 0.1
