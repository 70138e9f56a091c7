"""Rejection by ratio: which tokens the loss leaves out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vexact.algorithms.correction.settings import MAX_LOG_RATIO, CorrectionConfig, Rejection
from vexact.algorithms.correction.weights import spread
from vexact.algorithms.packed import segment_sum


def kept_tokens(log_ratio: Tensor, lengths: Tensor, config: CorrectionConfig) -> tuple[Tensor, dict[str, float]]:
    """Tokens that pass all rejections and the veto, and metrics: log_ratio (T,) fp64, lengths (N,) -> (T,) bool.

    Per token, with d clamped to +-20: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d (http://joschu.net/blog/kl-approx.html).
    ``seq_sum_k1`` bounds the ratio of the sequence (masked importance sampling, https://richardli.xyz/rl-collapse) and
    ``seq_mean_k1`` its geometric mean per token, the ratio of GSPO (https://arxiv.org/abs/2507.18071); a hard bound on
    sums, means and maxima of k2 and k3 is trust-region masking, https://arxiv.org/abs/2512.23075. A sequence that fails
    loses all of its tokens. The veto rejects a sequence that has a token with exp(d) < ``veto``, not clamped.
    """
    kept = torch.ones_like(log_ratio, dtype=torch.bool)
    metrics: dict[str, float] = {}
    for rejection in config.rejections:
        passed, seen = _passed(log_ratio, lengths, rejection)
        kept &= passed
        metrics |= seen
    if config.rejections:
        metrics |= _fractions("rollout_rs", kept, lengths)
    if config.veto is not None:
        low = log_ratio < math.log(config.veto)
        vetoed = segment_sum(low.double(), lengths) > 0
        kept &= ~torch.repeat_interleave(vetoed, lengths)
        metrics["rollout_is_veto_fraction"] = float(vetoed.double().mean())
        metrics["rollout_is_catastrophic_token_fraction"] = float(low.double().mean())
    return kept, metrics


def _passed(log_ratio: Tensor, lengths: Tensor, rejection: Rejection) -> tuple[Tensor, dict[str, float]]:
    level, kind = rejection.statistic.rsplit("_", 1)
    values = _divergence(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), kind)
    if level == "token":
        statistic, per_sequence = values, segment_sum(values, lengths) / lengths
    else:
        per_sequence = _reduced(values, lengths, level)
        statistic = torch.repeat_interleave(per_sequence, lengths)
    if kind == "k1":
        assert rejection.lower is not None, "a ratio is bounded on both sides"
        low, high = math.log(rejection.lower), math.log(rejection.upper)
    else:
        low, high = -math.inf, rejection.upper
    passed = (statistic >= low) & (statistic <= high)
    name = f"rollout_rs_{rejection.statistic}"
    decided = statistic if level == "token" else per_sequence
    metrics = {
        "mean": statistic.mean(),
        "max": decided.max(),
        "min": decided.min(),
        "std": statistic.clamp(low, high).var(correction=0).sqrt(),
        "fraction_high": (decided > high).double().mean(),
        "fraction_low": (decided < low).double().mean(),
        "seq_mean": per_sequence.mean(),
        "seq_std": spread(per_sequence),
        "seq_max": per_sequence.max(),
        "seq_min": per_sequence.min(),
        "seq_max_deviation": per_sequence.abs().max(),
        "seq_fraction_high": (per_sequence > high).double().mean(),
    }
    if kind == "k1":
        metrics["seq_fraction_low"] = (per_sequence < low).double().mean()
    named = {f"{name}_{key}": float(value) for key, value in metrics.items()}
    return passed, named | _fractions(name, passed, lengths)


def _divergence(log_ratio: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return -log_ratio
    return 0.5 * log_ratio.square() if kind == "k2" else torch.expm1(log_ratio) - log_ratio


def _reduced(values: Tensor, lengths: Tensor, level: str) -> Tensor:
    if level == "seq_max":
        return torch.segment_reduce(values, "max", lengths=lengths)
    sums = segment_sum(values, lengths)
    return sums if level == "seq_sum" else sums / lengths


def _fractions(name: str, kept: Tensor, lengths: Tensor) -> dict[str, float]:
    """Shares of the tokens that are rejected, and of the sequences that lose any."""
    lost = (~kept).double()
    return {
        f"{name}_masked_fraction": float(lost.mean()),
        f"{name}_seq_masked_fraction": float((segment_sum(lost, lengths) > 0).double().mean()),
    }
