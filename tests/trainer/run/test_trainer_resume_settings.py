"""Whatever decides the bits of a run is compared on a resume, and what is switched off by a switch is not."""

import pytest

from vexact.config import load_config
from vexact.trainer.resume.changes import breaking_changes
from vexact.trainer.resume.settings import deciding_settings

ACTOR, CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"
BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"


def changes(before, after):
    def identity(overrides):
        return {"settings": deciding_settings(load_config(overrides, checked=False), "cpu", 10)}

    return breaking_changes(identity(before), identity(after))


@pytest.mark.parametrize(
    ("turned_on", "switch"),
    [
        ([f"{BUFFER}.enable=true", f"{BUFFER}.len=4"], f"{BUFFER}.enable"),
        ([f"{CORRECTION}.rollout_is=token"], f"{CORRECTION}.rollout_is"),
        ([f"{CORRECTION}.rollout_rs=token_k3", f"{CORRECTION}.rollout_rs_threshold=1"], f"{CORRECTION}.rollout_rs"),
        ([f"{CORRECTION}.rollout_token_veto_threshold=1e-4"], f"{CORRECTION}.rollout_token_veto_threshold"),
        ([f"{CORRECTION}.loss_type=reinforce"], f"{CORRECTION}.loss_type"),
        ([f"{ACTOR}.router_aux_loss_coef=0.01"], f"{ACTOR}.router_aux_loss_coef"),
        ([f"{ACTOR}.router_bias_update_rate=0.01"], f"{ACTOR}.router_bias_update_rate"),
        ([f"{ACTOR}.use_kl_loss=true"], f"{ACTOR}.use_kl_loss"),
        (["algorithm.use_kl_in_reward=true"], "algorithm.use_kl_in_reward"),
        (["algorithm.filter_groups.enable=true"], "algorithm.filter_groups.enable"),
        ([f"{ACTOR}.optim.lr_scheduler_type=linear"], f"{ACTOR}.optim.lr_scheduler_type"),
        (["algorithm.adv_estimator=reinforce_plus_plus"], "algorithm.adv_estimator"),
    ],
)
def test_a_part_that_is_switched_on_or_off_is_named(turned_on, switch):
    assert [line for line in changes([], turned_on) if line.startswith(f"{switch}=")]
    assert [line for line in changes(turned_on, []) if line.startswith(f"{switch}=")]


@pytest.mark.parametrize(
    "without_effect",
    [
        [f"{BUFFER}.len=4", f"{BUFFER}.penalty_factor=2", "reward.reward_kwargs.max_resp_len=9"],
        [f"{CORRECTION}.rollout_is_threshold=3", f"{CORRECTION}.rollout_is_batch_normalize=true"],
        [f"{CORRECTION}.rollout_rs_threshold=0.1", f"{CORRECTION}.bypass_mode=true"],
        [f"{ACTOR}.kl_loss_coef=1", f"{ACTOR}.kl_loss_type=k1"],
    ],
)
def test_what_is_switched_off_is_not_compared(without_effect):
    assert changes([], without_effect) == changes(without_effect, []) == []
