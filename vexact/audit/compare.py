"""Rollout against training log-probabilities, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vexact.types import Sample


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """One response token whose two fp32 log-probabilities differ."""

    request_id: str
    position: int  # index in the response
    token_id: int
    rollout: float
    trainer: float
    ulp: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the audit saw in one optimizer step; log-probabilities compared as int32."""

    tokens_compared: int
    tokens_different: int
    sequences_different: int
    max_ulp: int
    max_abs_logprob_diff: float
    first: TokenDifference | None  # in the order of the sequences

    def metrics(self) -> dict[str, float]:
        """``bitwise/*``; ``first_different_position`` is -1 when there is none."""
        return {
            "bitwise/tokens_compared": float(self.tokens_compared),
            "bitwise/tokens_different": float(self.tokens_different),
            "bitwise/sequences_different": float(self.sequences_different),
            "bitwise/max_ulp": float(self.max_ulp),
            "bitwise/max_abs_logprob_diff": self.max_abs_logprob_diff,
            "bitwise/first_different_position": float(self.first.position if self.first else -1),
        }


def compare(samples: Sequence[Sample], trainer_logprobs: Sequence[np.ndarray]) -> Comparison:
    """Compares every response token.

    Args:
        samples: what the rollout produced.
        trainer_logprobs: per sample (R,) fp32, what the training forward gave the same tokens.

    Raises:
        ValueError: a sample and its log-probabilities differ in length or dtype.
    """
    for sample, trainer in zip(samples, trainer_logprobs, strict=True):
        rollout = sample.logprobs
        if rollout.shape != trainer.shape or rollout.dtype != np.float32 or trainer.dtype != np.float32:
            raise ValueError(
                f"request {sample.request_id}: rollout log-probs are {rollout.dtype}{rollout.shape}, the trainer's "
                f"{trainer.dtype}{trainer.shape}; both must be float32 of one length"
            )
    if not samples:
        return Comparison(0, 0, 0, 0, 0.0, None)
    rollouts, trainers = np.concatenate([sample.logprobs for sample in samples]), np.concatenate(trainer_logprobs)
    where = np.flatnonzero(rollouts.view(np.int32) != trainers.view(np.int32))
    if not len(where):
        return Comparison(len(rollouts), 0, 0, 0, 0.0, None)
    ends = np.cumsum([len(sample.logprobs) for sample in samples])
    sequences = np.searchsorted(ends, where, side="right")
    a, b = rollouts[where], trainers[where]
    ulps = np.abs(_ordered(a) - _ordered(b))
    sample = samples[sequences[0]]
    position = int(where[0] - ends[sequences[0]]) + len(sample.logprobs)
    first = TokenDifference(
        sample.request_id, position, sample.token_ids[position], float(a[0]), float(b[0]), int(ulps[0])
    )
    max_diff = float(np.abs(a.astype(np.float64) - b).max())
    return Comparison(len(rollouts), len(where), len(np.unique(sequences)), int(ulps.max()), max_diff, first)


def _ordered(values: np.ndarray) -> np.ndarray:
    """fp32 -> int64 such that neighbouring floats differ by 1."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
