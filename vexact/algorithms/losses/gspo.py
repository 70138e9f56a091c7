"""GSPO: one importance ratio per sequence, the geometric mean of its token ratios."""

from __future__ import annotations

import torch

from vexact.algorithms.losses.inputs import PolicyLossConfig, PolicyLossInputs, PolicyLossOutput
from vexact.algorithms.packed import segment_sum

MAX_LOG_RATIO = 10.0


def gspo(inputs: PolicyLossInputs, config: PolicyLossConfig) -> PolicyLossOutput:
    """max(-A s, -A clip(s, 1 - low, 1 + high)) with s = exp(mean_t(logprob_t - old_logprob_t)).

    https://arxiv.org/abs/2507.18071. Every token uses sg[s] * pi / sg[pi] (the paper's GSPO-token), so the value is the
    sequence's ratio and the gradient of each token flows through its own log-probability; the log-ratio is clamped
    at 10 from above, as in verl. There is no dual clip: ``pg_clipfrac_lower`` is zero.
    """
    log_ratio = (inputs.logprobs - inputs.old_logprobs).detach()
    mean_log_ratio = segment_sum(log_ratio, inputs.lengths) / inputs.lengths
    own = inputs.logprobs - inputs.logprobs.detach()
    ratio = (own + torch.repeat_interleave(mean_log_ratio, inputs.lengths)).clamp(max=MAX_LOG_RATIO).exp()
    free = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1 - config.low, 1 + config.high)
    metrics = {
        "pg_clipfrac": (clipped > free).detach().float(),
        "pg_clipfrac_lower": torch.zeros_like(log_ratio),
        "ppo_kl": -log_ratio,
    }
    return PolicyLossOutput(torch.maximum(free, clipped), metrics)
