"""Dr. GRPO: GRPO without the division by the standard deviation, which favours easy and hard prompts."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vexact.algorithms.advantages.grpo import grpo
from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs


def dr_grpo(inputs: AdvantageInputs, config: AdvantageConfig) -> Tensor:
    """A_i = r_i - mean_group on every token of sequence i; (T,) fp32. https://arxiv.org/abs/2503.20783.

    Pair it with ``loss_agg_mode=seq-mean-token-sum-norm`` to leave out the length normalisation as well.
    """
    return grpo(inputs, replace(config, norm_adv_by_std_in_grpo=False))
