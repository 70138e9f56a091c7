"""`algorithm.*`: rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.fields import opt, section
from vexact.config.sections.actor import KLKind
from vexact.config.sections.rollout_correction import RolloutCorrection

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
_NOT_BUILT_IN = (
    "this estimator is not built in; use grpo, dr_grpo, rloo, reinforce_plus_plus or reinforce_plus_plus_baseline"
)


@dataclass(frozen=True)
class KLControl:
    type: Literal["fixed"] = opt(
        "fixed",
        "How kl_coef moves over the run.",
        refused={"adaptive": "the adaptive coefficient is not built in; set kl_coef"},
    )
    kl_coef: float = opt(0.001, "Weight of the KL term in the reward.", ge=0)


@dataclass(frozen=True)
class FilterGroups:
    enable: bool = opt(False, "DAPO's dynamic sampling: drop prompts whose samples all score the same, and refill.")
    metric: str | None = opt(
        None,
        "What must differ within a group: score, reward (the score after the overlong penalty), or a key that the "
        "reward function returns; null is score.",
        verl="reward",
        refused={"seq_final_reward": "the KL term of rewards is computed after groups are chosen; use reward"},
        aliases={"seq_reward": "reward"},
    )
    max_num_gen_batches: int = opt(
        0, "Give up after so many generation batches per step; 0 or -1 never gives up.", ge=-1
    )


@dataclass(frozen=True)
class AlgorithmSection:
    adv_estimator: Estimator = opt(
        "grpo",
        "How rewards become advantages.",
        verl="gae",
        refused={
            "gae": "GAE needs a critic, which this version does not have; use grpo, rloo or reinforce_plus_plus",
            **dict.fromkeys(
                ("remax", "opo", "gpg", "gdpo", "grpo_passk", "optimal_token_baseline", "tir_optimal_token_baseline"),
                _NOT_BUILT_IN,
            ),
        },
        aliases={"grpo_vectorized": "grpo", "rloo_vectorized": "rloo"},
    )
    norm_adv_by_std_in_grpo: bool = opt(
        True, "Divide GRPO advantages by the group's standard deviation; false is Dr.GRPO."
    )
    gamma: float = opt(1.0, "Discount per token (REINFORCE++ only).", gt=0, le=1)
    use_kl_in_reward: bool = opt(False, "Subtract the KL towards the initial policy from the reward of each token.")
    kl_penalty: KLKind = opt(
        "kl", "KL estimator of that term.", refused={"full": "the full-vocabulary KL is not built in; use kl"}
    )
    kl_ctrl: KLControl = section(KLControl, "Weight of that term.")
    recompute_old_log_prob: bool = opt(
        False,
        "Recompute the old log-probabilities by a forward of the trainer before each update, as other frameworks must "
        "(timing_s/old_log_prob), and let the loss use these. An exact run gets the bits that it has already; a "
        "rollout that is not exact gets a meaningful importance ratio.",
    )
    filter_groups: FilterGroups = section(FilterGroups, "Dynamic sampling.")
    rollout_correction: RolloutCorrection = section(RolloutCorrection, "Samples of another policy than the trainer's.")

    @property
    def bypasses(self) -> bool:
        """Whether samples are corrected towards the policy being trained, not towards recomputed old ones."""
        given = self.rollout_correction.bypass_mode
        return not self.recompute_old_log_prob if given is None else given
