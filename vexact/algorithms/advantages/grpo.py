"""GRPO: the reward relative to its group, in units of the group's standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.packed import Groups

STD_EPSILON = 1e-6


def grpo(inputs: AdvantageInputs, config: AdvantageConfig) -> Tensor:
    """A_i = (r_i - mean_group) / (std_group + 1e-6) on every token of sequence i, std unbiased; (T,) fp32.

    https://arxiv.org/abs/2402.03300, equation 3.2 outcome supervision. ``norm_adv_by_std_in_grpo=False`` leaves the
    division out (Dr. GRPO). A group of one keeps its reward, as in verl (mean 0, std 1).
    """
    outcomes = inputs.outcomes()
    groups = Groups(outcomes, inputs.group_ids)
    alone = groups.size_of == 1
    advantages = torch.where(alone, outcomes, groups.centred)
    if config.norm_adv_by_std_in_grpo:
        std = torch.where(alone, torch.ones_like(outcomes), groups.std())
        advantages = advantages / (std + STD_EPSILON)
    return inputs.per_token(advantages)
