"""Algorithms by the names users write in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from vexact.algorithms.advantages.dr_grpo import dr_grpo
from vexact.algorithms.advantages.grpo import grpo
from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.advantages.reinforce_plus_plus import reinforce_plus_plus
from vexact.algorithms.advantages.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from vexact.algorithms.advantages.rloo import rloo
from vexact.algorithms.losses.gspo import gspo
from vexact.algorithms.losses.inputs import PolicyLossConfig, PolicyLossInputs, PolicyLossOutput
from vexact.algorithms.losses.ppo_clip import ppo_clip
from vexact.algorithms.losses.reinforce import reinforce

T = TypeVar("T")
AdvantageEstimator = Callable[[AdvantageInputs, AdvantageConfig], Tensor]
PolicyLoss = Callable[[PolicyLossInputs, PolicyLossConfig], PolicyLossOutput]

ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "vanilla": ppo_clip,
    "gspo": gspo,
    "reinforce": reinforce,
    "gpg": reinforce,
}

FIXED_AGG_MODES: dict[str, str] = {"gspo": "seq-mean-token-mean"}
"""Losses that are defined per sequence and, as in verl, ignore ``loss_agg_mode``."""

PER_TOKEN_LOSSES = frozenset({"vanilla", "reinforce", "gpg"})
"""Losses whose value for a token depends on no other token's log-probability."""


def advantage_estimator(name: str) -> AdvantageEstimator:
    """The estimator of ``algorithm.adv_estimator=name``. Raises ValueError listing the known names."""
    return _lookup(ADVANTAGE_ESTIMATORS, "algorithm.adv_estimator", name)


def policy_loss(name: str) -> PolicyLoss:
    """The loss of ``actor.policy_loss.loss_mode=name``. Raises ValueError listing the known names."""
    return _lookup(POLICY_LOSSES, "actor.policy_loss.loss_mode", name)


def _lookup(table: Mapping[str, T], key: str, name: str) -> T:
    if name not in table:
        raise ValueError(f"unknown {key} {name!r}; choose one of {', '.join(table)}")
    return table[name]
