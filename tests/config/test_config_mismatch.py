"""The mismatch dial's keys: a deliberate baseline, alone, within range."""

from __future__ import annotations

import pytest

from vexact.config import load_config
from vexact.config.fields import ConfigError

DIAL = "actor_rollout_ref.rollout.mismatch"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.parquet").touch()
    return [f"actor_rollout_ref.model.path={tmp_path}", f"data.train_files={tmp_path}/rows.parquet"]


def test_a_mismatch_warns_instead_of_stopping_unless_told(base):
    config = load_config([*base, f"{DIAL}.mode=noise", f"{DIAL}.scale=0.5"])
    assert config.trainer.exactness == "warn"
    assert any("mismatch.mode=noise cannot be exact" in notice for notice in config.notices)
    assert load_config([*base, f"{DIAL}.mode=noise", "trainer.exactness=strict"]).trainer.exactness == "strict"
    assert load_config(base).trainer.exactness == "strict"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([f"{DIAL}.scale=0.5"], "has no effect without"),
        ([f"{DIAL}.mode=k_order", f"{DIAL}.scale=1.5"], "k_order takes a share between 0 and 1"),
        ([f"{DIAL}.mode=k_order", "actor_rollout_ref.rollout.batch_invariant=false"], "must be the only difference"),
        ([f"{DIAL}.mode=k_order", "actor_rollout_ref.rollout.attn_impl=sdpa"], "must be the only difference"),
    ],
)
def test_settings_that_make_no_sense_are_refused(base, overrides, part):
    with pytest.raises(ConfigError, match=part):
        load_config([*base, *overrides])
