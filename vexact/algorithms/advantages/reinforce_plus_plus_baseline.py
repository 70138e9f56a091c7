"""REINFORCE++ with the mean reward of the group as a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.packed import Groups, whiten


def reinforce_plus_plus_baseline(inputs: AdvantageInputs, config: AdvantageConfig) -> Tensor:
    """(r_i - mean_group) on every token, whitened over all tokens of the batch; (T,) fp32.

    https://arxiv.org/abs/2501.03262. A group of one keeps its reward, as in verl (mean 0).
    Raises ValueError when the batch has a single token.
    """
    outcomes = inputs.outcomes()
    groups = Groups(outcomes, inputs.group_ids)
    centred = torch.where(groups.size_of == 1, outcomes, groups.centred)
    return whiten(torch.repeat_interleave(centred, inputs.lengths)).float()
