"""DAPO's penalty on overlong responses, as the run is configured."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.algorithms import overlong_penalty
from vexact.config import Config


def overlong_penalties(config: Config, lengths: Tensor) -> Tensor:
    """What to add to the score of a response of each length: (N,) int64 -> (N,) fp32, at most 0."""
    buffer = config.reward.reward_kwargs.overlong_buffer_cfg
    if not buffer.enable:
        return torch.zeros(len(lengths))
    return overlong_penalty(lengths, config.overlong_length, buffer.len, buffer.penalty_factor)
