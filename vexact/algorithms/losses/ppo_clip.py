"""PPO's clipped surrogate with separate lower and upper bounds (clip-higher) and the dual clip."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.algorithms.losses.inputs import PolicyLossConfig, PolicyLossInputs, PolicyLossOutput

MAX_LOG_RATIO = 20.0


def ppo_clip(inputs: PolicyLossInputs, config: PolicyLossConfig) -> PolicyLossOutput:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), and at most -A c where A < 0; r = exp(logprob - old_logprob).

    Clipping https://arxiv.org/abs/1707.06347, dual clip https://arxiv.org/abs/1912.09729, clip-higher
    https://arxiv.org/abs/2503.14476. The log-ratio is clamped to +-20 before the exponential, as in verl.
    """
    log_ratio = (inputs.logprobs - inputs.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    free = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1 - config.low, 1 + config.high)
    pessimistic = torch.maximum(free, clipped)
    ceiling = -inputs.advantages * config.clip_ratio_c
    negative = inputs.advantages < 0
    losses = torch.where(negative, torch.minimum(pessimistic, ceiling), pessimistic)
    metrics = {
        "pg_clipfrac": _indicator(clipped > free),
        "pg_clipfrac_lower": _indicator(negative & (pessimistic > ceiling)),
        "ppo_kl": -log_ratio.detach(),
    }
    return PolicyLossOutput(losses, metrics)


def _indicator(condition: Tensor) -> Tensor:
    return condition.detach().float()
