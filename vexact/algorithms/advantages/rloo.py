"""RLOO: the baseline of a sample is the mean reward of the *other* samples of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.packed import Groups


def rloo(inputs: AdvantageInputs, config: AdvantageConfig) -> Tensor:
    """A_i = r_i - mean_{j != i} r_j = n/(n-1) (r_i - mean_group); (T,) fp32. https://arxiv.org/abs/2402.14740.

    A group of one keeps its reward, as in verl's ``rloo``.
    """
    outcomes = inputs.outcomes()
    groups = Groups(outcomes, inputs.group_ids)
    scale = groups.size_of / (groups.size_of - 1).clamp_min(1)
    return inputs.per_token(torch.where(groups.size_of == 1, outcomes, groups.centred * scale))
