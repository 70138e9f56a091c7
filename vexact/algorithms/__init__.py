"""Advantages, policy losses, KL penalties and loss aggregation: pure functions on packed tensors."""

from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.correction import (
    CorrectionConfig,
    LossScales,
    Rejection,
    importance_weights,
    kept_tokens,
    loss_scales,
)
from vexact.algorithms.dapo import informative_groups, overlong_penalty
from vexact.algorithms.kl import KL_ESTIMATORS, kl_penalty
from vexact.algorithms.losses.aggregate import LOSS_AGG_MODES, Denominators, aggregate, check_agg_mode, token_weights
from vexact.algorithms.losses.inputs import PolicyLossConfig, PolicyLossInputs, PolicyLossOutput
from vexact.algorithms.registry import (
    ADVANTAGE_ESTIMATORS,
    FIXED_AGG_MODES,
    PER_TOKEN_LOSSES,
    POLICY_LOSSES,
    advantage_estimator,
    policy_loss,
)

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "FIXED_AGG_MODES",
    "KL_ESTIMATORS",
    "LOSS_AGG_MODES",
    "PER_TOKEN_LOSSES",
    "POLICY_LOSSES",
    "AdvantageConfig",
    "AdvantageInputs",
    "CorrectionConfig",
    "Denominators",
    "LossScales",
    "PolicyLossConfig",
    "PolicyLossInputs",
    "PolicyLossOutput",
    "Rejection",
    "advantage_estimator",
    "aggregate",
    "check_agg_mode",
    "importance_weights",
    "informative_groups",
    "kept_tokens",
    "kl_penalty",
    "loss_scales",
    "overlong_penalty",
    "policy_loss",
    "token_weights",
]
