"""Rollout against training log-probabilities, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vexact.audit.routes import RouteComparison, compare_routes
from vexact.types import Sample


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """One response token whose two fp32 log-probabilities differ, or are not both finite."""

    request_id: str
    position: int  # index in the response
    token_id: int
    rollout: float
    trainer: float
    ulp: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.rollout) and math.isfinite(self.trainer)

    def describe(self) -> str:
        """Where it is and both values."""
        note = f"{self.ulp} ulp" if self.is_finite else "not finite"
        return (
            f"request {self.request_id}, response position {self.position}, token {self.token_id}, "
            f"rollout {self.rollout!r}, trainer {self.trainer!r} ({note})"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the audit saw in one optimizer step; log-probabilities compared as int32.

    NaN and infinity are no log-probabilities: a token that has one on either side is different, whatever its bits.
    """

    tokens_compared: int
    tokens_different: int
    sequences_different: int
    max_ulp: int
    max_abs_logprob_diff: float  # infinite when a value is not finite
    first: TokenDifference | None  # in the order of the sequences
    tokens_nonfinite: int = 0  # of the different ones
    routes: RouteComparison | None = None  # of a model with experts

    @property
    def exact(self) -> bool:
        """Something was compared and nothing differs, experts included."""
        return self.tokens_compared > 0 and self.tokens_different == 0 and (self.routes is None or self.routes.exact)

    @property
    def differs(self) -> bool:
        """Whether something that was compared differs."""
        return self.first is not None or (self.routes is not None and self.routes.first is not None)

    @property
    def first_request(self) -> str | None:
        """The request of the first log-probability that differs, else of the first token with other experts."""
        first = self.first or (None if self.routes is None else self.routes.first)
        return None if first is None else first.request_id

    def metrics(self) -> dict[str, float]:
        """``bitwise/*``; ``first_different_position`` is -1 when there is none."""
        return {
            "bitwise/tokens_compared": float(self.tokens_compared),
            "bitwise/tokens_different": float(self.tokens_different),
            "bitwise/tokens_nonfinite": float(self.tokens_nonfinite),
            "bitwise/sequences_different": float(self.sequences_different),
            "bitwise/max_ulp": float(self.max_ulp),
            "bitwise/max_abs_logprob_diff": self.max_abs_logprob_diff,
            "bitwise/first_different_position": float(self.first.position if self.first else -1),
        } | ({} if self.routes is None else self.routes.metrics())

    def describe(self) -> str:
        """What differs, how much, and the first such token; for a comparison that is not exact."""
        if self.first is None:
            if self.routes is not None and self.tokens_compared:
                return self.routes.describe()
            return "nothing was compared, 0 log-probabilities"
        experts = "" if self.routes is None or self.routes.exact else f". And {self.routes.describe()}"
        what = "have other bits"
        if self.tokens_nonfinite:
            what += f" or no finite value ({self.tokens_nonfinite})"
        return (
            f"{self.tokens_different} of {self.tokens_compared} log-probabilities in {self.sequences_different} "
            f"sequences {what} (largest gap {self.max_abs_logprob_diff:.3g}, {self.max_ulp} ulp). First: "
            f"{self.first.describe()}{experts}"
        )


def compare(
    samples: Sequence[Sample],
    trainer_logprobs: Sequence[np.ndarray],
    trainer_routes: Sequence[np.ndarray] | None = None,
) -> Comparison:
    """Compares every response token.

    Args:
        samples: what the rollout produced.
        trainer_logprobs: per sample (R,) fp32, what the training forward gave the same tokens.
        trainer_routes: per sample (R,) int64, the digests of the experts that its rows chose, if there are any.

    Raises:
        ValueError: a sample and its log-probabilities or digests differ in length or dtype.
    """
    return replace(_compare(samples, trainer_logprobs), routes=compare_routes(samples, trainer_routes))


def _compare(samples: Sequence[Sample], trainer_logprobs: Sequence[np.ndarray]) -> Comparison:
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
    where = np.flatnonzero(_differ(rollouts, trainers))
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
    finite = np.isfinite(a) & np.isfinite(b)
    largest = float(np.abs(a.astype(np.float64) - b).max()) if finite.all() else math.inf
    return Comparison(
        tokens_compared=len(rollouts),
        tokens_different=len(where),
        sequences_different=len(np.unique(sequences)),
        max_ulp=int(ulps.max()),
        max_abs_logprob_diff=largest,
        first=first,
        tokens_nonfinite=int((~finite).sum()),
    )


def larger_gap(known: float, new: float) -> float:
    """The larger of two gaps, of which one to a value that is none is infinite."""
    return math.inf if math.isnan(new) else max(known, new)


def different_tokens(
    samples: Sequence[Sample],
    trainer_logprobs: Sequence[np.ndarray],
    trainer_routes: Sequence[np.ndarray] | None = None,
) -> dict[str, list[int]]:
    """Request -> positions in its response that ``compare``, which takes the same, finds different; [] for none."""
    found = {}
    for index, (sample, trainer) in enumerate(zip(samples, trainer_logprobs, strict=True)):
        wrong = _differ(sample.logprobs, trainer)
        if sample.route_digests is not None and trainer_routes is not None:
            wrong |= sample.route_digests != trainer_routes[index]
        found[sample.request_id] = np.flatnonzero(wrong).tolist()
    return found


def _differ(rollout: np.ndarray, trainer: np.ndarray) -> np.ndarray:
    """Where the bits are equal, one side being finite makes both so."""
    differ: np.ndarray = (rollout.view(np.int32) != trainer.view(np.int32)) | ~np.isfinite(rollout)
    return differ


def _ordered(values: np.ndarray) -> np.ndarray:
    """fp32 -> int64 such that neighbouring floats differ by 1."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
