"""The per-step audit: what was sampled is what is trained, or the run says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from vexact.audit.compare import Comparison, compare
from vexact.audit.mismatch_metrics import mismatch_metrics
from vexact.types import Sample

log = logging.getLogger(__name__)


class ExactnessError(RuntimeError):
    """Rollout and trainer disagree in at least one bit, or were not compared; ``comparison`` says where."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        super().__init__(
            f"rollout and trainer disagree: {comparison.describe()}. The weights are as they were before this step; "
            "trainer.exactness=warn logs such differences and goes on"
            if comparison.first is not None
            else f"{comparison.describe()}: this update proves nothing about rollout and trainer"
        )


class Audit:
    """Compares the first optimizer step's forward with the rollout; give :meth:`check` to ``Actor.update``.

    Under ``strict`` an unequal bit raises before any weight changes; under ``warn`` it is logged; ``off`` skips it.
    """

    def __init__(self, exactness: str) -> None:
        if exactness not in ("strict", "warn", "off"):
            raise ValueError(f"trainer.exactness={exactness!r}; use strict, warn or off")
        self.exactness = exactness
        self._samples: Sequence[Sample] = ()
        self._metrics: dict[str, float] = {}
        self.total_compared = self.total_different = 0  # over all checks of this process

    def begin(self, samples: Sequence[Sample]) -> None:
        """The samples that the next update trains on, in its order."""
        self._samples = samples
        self._metrics = {}

    def check(self, indices: list[int], logprobs: list[np.ndarray]) -> None:
        """
        Raises:
            ExactnessError: bits differ and exactness is strict.
        """
        if self.exactness == "off":
            return
        started = perf_counter()
        samples = [self._samples[i] for i in indices]
        comparison = compare(samples, logprobs)
        self.total_compared += comparison.tokens_compared
        self.total_different += comparison.tokens_different
        self._metrics = comparison.metrics() | mismatch_metrics([s.logprobs for s in samples], logprobs)
        self._metrics["timing_s/audit"] = perf_counter() - started
        if not comparison.exact:
            if self.exactness == "strict":
                raise ExactnessError(comparison)
            if self.total_different == comparison.tokens_different:
                what = f"rollout and trainer disagree: {comparison.describe()}"
                log.warning("%s (later steps: see the mismatch column and bitwise/*)", what)

    def require_compared(self) -> None:
        """To be called after an update: one that compared nothing proves nothing.

        Raises:
            ExactnessError: no log-probability was compared and exactness is strict.
        """
        if not self._metrics.get("bitwise/tokens_compared") and self.exactness == "strict":
            raise ExactnessError(compare((), ()))

    def metrics(self) -> dict[str, float]:
        """``bitwise/*``, ``training/rollout_probs_diff_*``, ``rollout_corr/*`` and the time of the last check."""
        return self._metrics
