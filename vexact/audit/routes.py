"""Experts that the rollout chose against those of the training forward, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vexact.types import Sample


@dataclass(frozen=True, slots=True)
class RouteDifference:
    """One response token that two rows predicted which went to other experts."""

    request_id: str
    position: int  # index in the response
    token_id: int

    def describe(self) -> str:
        """Where it is."""
        return f"request {self.request_id}, response position {self.position}, token {self.token_id}"


@dataclass(frozen=True, slots=True)
class RouteComparison:
    """What the audit saw of the experts in one optimizer step: one digest for every response token, of the experts that
    the row predicting it chose in all layers."""

    compared: int
    different: int
    missing: int  # tokens whose digest one side does not give
    first: RouteDifference | None  # in the order of the sequences

    @property
    def exact(self) -> bool:
        """Every token was compared, and none differs."""
        return self.compared > 0 and not self.different and not self.missing

    def metrics(self) -> dict[str, float]:
        """``bitwise/routes_compared`` and ``bitwise/routes_different``."""
        return {
            "bitwise/routes_compared": float(self.compared),
            "bitwise/routes_different": float(self.different),
        }

    def describe(self) -> str:
        """For a comparison that is not exact."""
        if self.first is not None:
            return (
                f"of {self.compared} tokens {self.different} were predicted by rows that went to other experts. First: "
                f"{self.first.describe()}"
            )
        return f"the experts of {self.missing} tokens were not compared: one side does not say which they were"


def compare_routes(samples: Sequence[Sample], trainer: Sequence[np.ndarray] | None) -> RouteComparison | None:
    """Compares every response token; None for a model without experts.

    Args:
        samples: what the rollout produced.
        trainer: per sample (R,) int64, the digests of the training forward; None when it gave none.

    Raises:
        ValueError: a sample and its digests differ in length or dtype.
    """
    if trainer is None and all(sample.route_digests is None for sample in samples):
        return None
    compared = different = missing = 0
    first = None
    for index, sample in enumerate(samples):
        theirs = None if trainer is None else trainer[index]
        ours, length = sample.route_digests, len(sample.token_ids)
        if ours is None or theirs is None:
            missing += length
            continue
        if not ours.shape == theirs.shape == (length,) or not ours.dtype == theirs.dtype == np.int64:
            raise ValueError(
                f"request {sample.request_id}: the rollout's route digests are {ours.dtype}{ours.shape}, the trainer's "
                f"{theirs.dtype}{theirs.shape}; both must be int64, one for each of {length} tokens"
            )
        where = np.flatnonzero(ours != theirs)
        compared += length
        different += len(where)
        if len(where) and first is None:
            position = int(where[0])
            first = RouteDifference(sample.request_id, position, sample.token_ids[position])
    return RouteComparison(compared, different, missing, first)
