"""`algorithm.rollout_correction.*`: verl's spellings are read, contradictions are refused with the key and the fix."""

from __future__ import annotations

import re

import pytest

from vexact.config import ConfigError, load_config

KEY = "algorithm.rollout_correction"
RECOMPUTE = "algorithm.recompute_old_log_prob=true"
INEXACT = "actor_rollout_ref.rollout.mismatch.mode=k_order"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.parquet").touch()
    return [f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path}/rows.parquet"]


def under_key(text):
    """A space-separated list of keys of the section and their values."""
    return [f"{KEY}.{part}" for part in text.split()]


@pytest.mark.parametrize(
    ("text", "bounds", "rejections"),
    [
        ("rollout_is=token", (None, 2.0), []),
        ("rollout_is=sequence rollout_is_threshold=5", (None, 5.0), []),
        ("rollout_is=token rollout_is_threshold=0.5_5", (0.5, 5.0), []),  # a number to Python and to YAML
        ("rollout_rs=seq_mean_k1 rollout_rs_threshold=0.999_1.001", (None, 2.0), [("seq_mean_k1", 0.999, 1.001)]),
        ("rollout_rs=token_k1 rollout_rs_threshold=4", (None, 2.0), [("token_k1", 0.25, 4.0)]),
        (
            "rollout_rs=token_k1,seq_max_k3 rollout_rs_threshold=0.5_2.0,1e-3",
            (None, 2.0),
            [("token_k1", 0.5, 2.0), ("seq_max_k3", None, 1e-3)],
        ),
        (
            "rollout_rs=seq_sum_k2,seq_mean_k3 rollout_rs_threshold=0.01",
            (None, 2.0),
            [("seq_sum_k2", None, 0.01), ("seq_mean_k3", None, 0.01)],
        ),
    ],
)
def test_bounds_are_read_as_verl_reads_them(base, text, bounds, rejections):
    section = load_config([*base, *under_key(text)]).algorithm.rollout_correction
    assert (section.weight_bounds(), section.rejections()) == (bounds, rejections)


def test_bounds_of_a_recipe_keep_how_they_were_written(base, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "algorithm:\n  rollout_correction:\n    rollout_is: token\n    rollout_is_threshold: 0.5_5\n"
        "    rollout_rs: token_k2\n    rollout_rs_threshold: 0.5\n"
    )
    section = load_config([f"recipe={recipe}", *base]).algorithm.rollout_correction
    assert section.weight_bounds() == (0.5, 5.0)
    assert section.rejections() == [("token_k2", None, 0.5)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *[
            (under_key(f"rollout_is=token rollout_is_threshold={value}"), f"rollout_is_threshold={value}: .*0.5_5.0")
            for value in ("", "two", "0", "-1", "nan", "inf", "1e400", "1e-320", "2_1", "1_2_3", "_2", "0_2")
        ],
        (under_key("rollout_rs=token_k1"), "rollout_rs=token_k1 needs algorithm.*rollout_rs_threshold, e.g. 0.5_2.0"),
        (under_key("rollout_rs_threshold=2"), "rollout_rs_threshold=2 has no effect without .*rollout_rs; set it"),
        (under_key("rollout_rs=geometric rollout_rs_threshold=2"), "geometric is called seq_mean_k1 now"),
        (under_key("rollout_rs=seq_max_k1 rollout_rs_threshold=2"), "rollout_rs=seq_max_k1: every option must be one"),
        (under_key("rollout_rs=token_k1, rollout_rs_threshold=2"), "every option must be one of token_k1"),
        (under_key("rollout_rs=token_k2,token_k2 rollout_rs_threshold=2"), "token_k2 is given twice"),
        (under_key("rollout_rs=token_k2 rollout_rs_threshold=1,2"), "2 thresholds for the 1 options"),
        (under_key("rollout_rs=token_k2 rollout_rs_threshold=0.1_2"), "no lower bound"),
        (under_key("rollout_rs=token_k3 rollout_rs_threshold=-1"), "token_k3 takes the largest value in nats"),
        (under_key("rollout_rs=seq_sum_k1 rollout_rs_threshold=0.5"), "an upper bound alone must be at least 1"),
        (under_key("rollout_token_veto_threshold=1"), "rollout_token_veto_threshold=1.*must be > 0 and < 1"),
        (under_key("rollout_token_veto_threshold=0"), "must be > 0 and < 1"),
        (under_key("rollout_is_batch_normalize=true"), "has no effect without .*rollout_is; set it to token"),
        ([*under_key("bypass_mode=true"), RECOMPUTE], "set one of them to false"),
        ([*under_key("bypass_mode=false"), INEXACT], "set algorithm.recompute_old_log_prob=true"),
        ([*under_key("loss_type=reinforce"), RECOMPUTE], f"set {LOSS}=reinforce"),
        ([*under_key("loss_type=reinforce"), f"{LOSS}=gspo"], "two losses"),
        ([*under_key("rollout_is=token"), INEXACT], "would only be reported"),
        (under_key("loss_type=ppo"), "expected ppo_clip | reinforce"),
    ],
)
def test_what_makes_no_sense_is_refused(base, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([*base, *overrides])
    assert re.search(rf"{re.escape(KEY)}\.\w+", str(caught.value))


@pytest.mark.parametrize(
    ("overrides", "bypasses", "loss"),
    [
        ([], True, "vanilla"),
        ([RECOMPUTE], False, "vanilla"),
        (under_key("bypass_mode=false"), False, "vanilla"),  # an exact rollout has the trainer's bits already
        ([*under_key("bypass_mode=true rollout_is=token"), INEXACT], True, "vanilla"),
        ([*under_key("loss_type=reinforce rollout_is=token"), INEXACT], True, "reinforce"),
        ([*under_key("rollout_is=token"), RECOMPUTE, INEXACT], False, "vanilla"),
    ],
)
def test_the_mode_and_the_loss_in_force(base, overrides, bypasses, loss):
    config = load_config([*base, *overrides])
    assert (config.algorithm.bypasses, config.loss_mode) == (bypasses, loss)
