"""verl's mismatch metrics. At zero they are necessary, not sufficient: ``bitwise/*`` is the proof."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BOUND = 20.0  # verl clamps log-ratios to +-20 before exponentiating


def mismatch_metrics(rollout: Sequence[np.ndarray], trainer: Sequence[np.ndarray]) -> dict[str, float]:
    """``training/rollout_probs_diff_*`` (in probability space) and ``rollout_corr/*`` (d = trainer - rollout log-prob).

    Args:
        rollout, trainer: per sequence (R,) fp32 log-probabilities of the same tokens; empty sequences are left out.
            NaN and infinities are no log-probabilities and make every figure NaN.

    Raises:
        ValueError: the two sides differ in the number or the lengths of their sequences.
    """
    lengths = np.array([len(sequence) for sequence in rollout])
    if lengths.tolist() != [len(sequence) for sequence in trainer]:
        raise ValueError("rollout and trainer log-probs differ in the number or the lengths of their sequences")
    if not rollout:
        return {"training/rollout_probs_diff_valid": 0.0}
    with np.errstate(invalid="ignore"):  # a signalling NaN
        a, b = (np.concatenate(side).astype(np.float64) for side in (trainer, rollout))
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.all():
        a, b = (np.where(finite, side, np.nan) for side in (a, b))
    return _probability_metrics(np.exp(a), np.exp(b)) | _token_metrics(a - b) | _sequence_metrics(a, b, lengths)


def _probability_metrics(trainer: np.ndarray, rollout: np.ndarray) -> dict[str, float]:
    diff = np.abs(trainer - rollout)
    prefix = "training/rollout_probs_diff"
    metrics = {
        f"{prefix}_valid": float(np.isfinite(diff).all()),
        f"{prefix}_max": float(diff.max()),
        f"{prefix}_mean": float(diff.mean()),
        f"{prefix}_std": float(diff.std(ddof=1)) if len(diff) > 1 else 0.0,
    }
    spread = trainer.std() * rollout.std()
    if spread > 0:  # elementwise: np.corrcoef would wake the threads of a matrix product
        covariance = ((trainer - trainer.mean()) * (rollout - rollout.mean())).mean()
        metrics["training/rollout_actor_probs_pearson_corr"] = float(np.clip(covariance / spread, -1.0, 1.0))
    return metrics


def _token_metrics(d: np.ndarray) -> dict[str, float]:
    ratio = np.exp(np.clip(d, -_BOUND, _BOUND))
    return {
        "rollout_corr/kl": float((-d).mean()) + 0.0,
        "rollout_corr/k3_kl": float((np.expm1(d) - d).mean()),
        "rollout_corr/chi2_token": float((ratio**2).mean()) - 1.0,
    }


def _sequence_metrics(trainer: np.ndarray, rollout: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    lengths = lengths[lengths > 0]
    starts = np.cumsum(lengths) - lengths
    mean_t, mean_r = (np.add.reduceat(side, starts) / lengths for side in (trainer, rollout))
    sums = np.add.reduceat(trainer - rollout, starts)
    gap = mean_r - mean_t
    return {
        "rollout_corr/training_ppl": float(np.exp(-mean_t).mean()),
        "rollout_corr/rollout_ppl": float(np.exp(-mean_r).mean()),
        "rollout_corr/training_log_ppl": float((-mean_t).mean()),
        "rollout_corr/rollout_log_ppl": float((-mean_r).mean()),
        "rollout_corr/log_ppl_diff": float(gap.mean()),
        "rollout_corr/log_ppl_abs_diff": float(np.abs(gap).mean()),
        "rollout_corr/log_ppl_diff_max": float(gap.max()),
        "rollout_corr/log_ppl_diff_min": float(gap.min()),
        "rollout_corr/ppl_ratio": float(np.exp(gap).mean()),
        "rollout_corr/chi2_seq": float(np.exp(2 * np.clip(sums, -_BOUND, _BOUND)).mean()) - 1.0,
    }
