"""Truncated and masked importance weights pi / pi_rollout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vexact.algorithms.correction.settings import MAX_LOG_RATIO, CorrectionConfig
from vexact.algorithms.packed import segment_sum

_TINY = 1e-8  # verl's guard: a mean weight below it normalises nothing


def importance_weights(log_ratio: Tensor, lengths: Tensor, config: CorrectionConfig) -> tuple[Tensor, dict[str, float]]:
    """The weight of every token, and ``rollout_is_*`` metrics: log_ratio (T,) fp64, lengths (N,) int64 -> (T,) fp64.

    Token level w_t = exp(d_t), sequence level w_t = exp(sum_s d_s) on every token of the sequence. ``upper`` alone
    gives min(w, upper): truncated importance sampling, https://fengyao.notion.site/off-policy-rl, for sequences
    https://richardli.xyz/rl-collapse. With ``lower`` a weight outside of [lower, upper] is 0: masked importance
    sampling, at token level IcePop, https://arxiv.org/abs/2510.18855. ``batch_normalize`` divides by the mean of what
    results, over tokens or over sequences; metrics are of the weights before that.
    """
    if config.level == "sequence":
        unclamped = torch.repeat_interleave(segment_sum(log_ratio, lengths), lengths)
    else:
        unclamped = log_ratio
    raw = unclamped.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.lower is None:
        weights = raw.clamp(max=config.upper)
    else:
        outside = (raw < config.lower) | (raw > config.upper)
        weights = raw.masked_fill(outside, 0.0)
    metrics = _metrics(weights, raw, unclamped, lengths, config)
    if config.lower is not None:
        metrics["rollout_is_oob_ratio"] = float(outside.double().mean())
    if config.batch_normalize:
        mean = float(weights.mean() if config.level == "token" else (segment_sum(weights, lengths) / lengths).mean())
        factor = 1.0 if mean <= _TINY else mean
        weights = weights / factor
        metrics["rollout_is_batch_norm_factor"] = factor
    return weights, metrics


def _metrics(
    weights: Tensor, raw: Tensor, unclamped: Tensor, lengths: Tensor, config: CorrectionConfig
) -> dict[str, float]:
    """verl's ``rollout_is_*``. Fractions are of raw weights beyond the bounds, the lower one 1 / upper if not given.

    The effective sample size, as a share of the tokens, is mean(w)^2 / mean(w^2).
    """
    upper, lower = config.upper, 1 / config.upper if config.lower is None else config.lower
    per_sequence, raw_per_sequence = (segment_sum(w, lengths) / lengths for w in (weights, raw))
    if config.level == "sequence":
        ends = lengths.cumsum(0) - 1
        sums = unclamped[ends]
        largest, smallest = sums.max().clamp(max=MAX_LOG_RATIO).exp(), sums.min().exp()
        high, low = sums > math.log(upper), sums < math.log(lower)
    else:
        largest, smallest = weights.max(), weights.min()
        high, low = raw > upper, raw < lower
    squares = weights.square().mean()
    metrics = {
        "mean": weights.mean(),
        "max": largest,
        "min": smallest,
        "std": weights.var(correction=0).sqrt(),
        "eff_sample_size": weights.mean().square() / squares if squares > 0 else squares,
        "ratio_fraction_high": high.double().mean(),
        "ratio_fraction_low": low.double().mean(),
        "seq_mean": per_sequence.mean(),
        "seq_std": spread(per_sequence),
        "seq_max": per_sequence.max(),
        "seq_min": per_sequence.min(),
        "seq_max_deviation": (per_sequence - 1).abs().max(),
        "seq_fraction_high": (raw_per_sequence > upper).double().mean(),
        "seq_fraction_low": (raw_per_sequence < lower).double().mean(),
    }
    return {f"rollout_is_{name}": float(value) for name, value in metrics.items()}


def spread(values: Tensor) -> Tensor:
    """Unbiased standard deviation, 0 of a single value."""
    return values.std() if values.numel() > 1 else values.new_zeros(())
