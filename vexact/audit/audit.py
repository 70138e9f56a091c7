"""The per-step audit: what was sampled is what is trained, or the run says so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from vexact.audit.compare import Comparison, compare, different_tokens
from vexact.audit.draws import DrawComparison, compare_draws
from vexact.audit.mismatch_metrics import mismatch_metrics
from vexact.training.passes.redraw import Redraw, Redrawn
from vexact.types import DrawSettings, Sample

log = logging.getLogger(__name__)


class ExactnessError(RuntimeError):
    """Rollout and trainer disagree in at least one bit, or were not compared; ``comparison`` says where."""

    def __init__(self, comparison: Comparison, shortfall: str = "") -> None:
        """``shortfall``: what was not compared, of a comparison in which nothing differs."""
        self.comparison, self.shortfall = comparison, shortfall
        super().__init__(
            f"rollout and trainer disagree: {comparison.describe()}. The weights are as they were before this step; "
            "trainer.exactness=warn logs such differences and goes on"
            if comparison.differs
            else f"{shortfall or comparison.describe()}: this update proves nothing about rollout and trainer"
        )

    def __reduce__(self) -> tuple[type[ExactnessError], tuple[Comparison, str]]:
        return ExactnessError, (self.comparison, self.shortfall)


class DrawError(RuntimeError):
    """The rollout sampled a token that its seed does not give for the trainer's logits; ``comparison`` says where."""

    def __init__(self, comparison: DrawComparison) -> None:
        self.comparison = comparison
        super().__init__(
            f"{comparison.describe()}. The weights are as they were before this step; trainer.exactness=warn logs such "
            "draws and goes on"
        )

    def __reduce__(self) -> tuple[type[DrawError], tuple[DrawComparison]]:
        return DrawError, (self.comparison,)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a forward gave for some of the samples: all that the audit needs of a rank."""

    indices: list[int]
    logprobs: list[np.ndarray]  # fp32 (R,) each
    redrawn: Redrawn | None
    routes: list[np.ndarray] | None = None  # int64 (R,) each, of a model with experts


_NOTHING = Evidence([], [], None)


class Audit:
    """Compares the first optimizer step's forward with the rollout; give :meth:`check` and ``redraw`` to
    ``Actor.update``.

    Under ``strict`` an unequal bit or draw raises before any weight changes; under ``warn`` it is logged; ``off`` skips
    it.
    """

    def __init__(self, exactness: str, redraw_ratio: float = 0.0, *, partial: bool = False) -> None:
        """``redraw_ratio`` is the share of the tokens whose draw is repeated. ``partial``: of one of several
        ranks, whose share of the samples may be nothing; the audit of them all says what it finds.

        Raises ValueError for an unknown ``exactness``.
        """
        if exactness not in ("strict", "warn", "off"):
            raise ValueError(f"trainer.exactness={exactness!r}; use strict, warn or off")
        self.exactness, self.redraw_ratio, self.partial = exactness, redraw_ratio, partial
        self.redraw: Redraw | None = None
        self._samples: Sequence[Sample] = ()
        self._metrics: dict[str, float] = {}
        self.evidence = _NOTHING  # of the last check
        # over all checks of this process
        self.total_compared = self.total_different = self.total_redrawn = self.total_redrawn_different = 0
        self.total_routes = self.total_routes_different = 0
        self.num_checks = 0
        self._has_warned = False

    def begin(self, samples: Sequence[Sample], settings: Sequence[DrawSettings] | None = None) -> None:
        """The samples that the next update trains on, in its order, and how each of them should have been drawn."""
        self._samples = samples
        self._metrics, self.evidence = {}, _NOTHING
        wanted = settings is not None and self.exactness != "off" and self.redraw_ratio > 0
        self.redraw = Redraw(samples, settings, self.redraw_ratio) if settings is not None and wanted else None

    def check(self, indices: list[int], logprobs: list[np.ndarray], routes: list[np.ndarray] | None = None) -> None:
        """
        Raises:
            ExactnessError: bits or experts differ and exactness is strict.
            DrawError: bits agree, a draw does not, and exactness is strict.
        """
        if self.exactness == "off":
            return
        started = perf_counter()
        samples = [self._samples[i] for i in indices]
        comparison = compare(samples, logprobs, routes)
        self.num_checks += 1
        self.total_compared += comparison.tokens_compared
        self.total_different += comparison.tokens_different
        if comparison.routes is not None:
            self.total_routes += comparison.routes.compared
            self.total_routes_different += comparison.routes.different
        self._metrics = comparison.metrics() | mismatch_metrics([s.logprobs for s in samples], logprobs)
        redrawn = None if self.redraw is None else self.redraw.take()
        self.evidence = Evidence(indices, logprobs, redrawn, routes)
        draws = self._check_draws(redrawn)
        self._metrics["timing_s/audit"] = perf_counter() - started
        if not comparison.exact and (indices or not self.partial):
            if self.exactness == "strict":
                raise ExactnessError(comparison)
            if not self._has_warned and not self.partial:
                self._has_warned = True
                what = f"rollout and trainer disagree: {comparison.describe()}"
                log.warning("%s (later steps: see the mismatch column and bitwise/*)", what)
        if draws is not None and draws.different:
            if self.exactness == "strict":
                raise DrawError(draws)
            if self.total_redrawn_different == draws.different and not self.partial:
                log.warning("%s (later steps: see bitwise/tokens_redrawn_different)", draws.describe())

    def require_compared(self, num_samples: int) -> None:
        """To be called after an update: what was not compared is not proved.

        Args:
            num_samples: how many were to be compared, over all ranks.

        Raises:
            ExactnessError: some were not, or no log-probability of theirs was, and exactness is strict.
        """
        if self.exactness != "strict":
            return
        compared, tokens = len(set(self.evidence.indices)), self._metrics.get("bitwise/tokens_compared", 0.0)
        if compared < num_samples or not tokens:
            what = f"{compared} of {num_samples} samples were compared, {tokens:.0f} log-probabilities"
            raise ExactnessError(compare((), ()), "nothing was compared" if not compared else what)

    def _check_draws(self, redrawn: Redrawn | None) -> DrawComparison | None:
        if redrawn is None:
            return None
        draws = compare_draws(self._samples, redrawn)
        self.total_redrawn += draws.redrawn
        self.total_redrawn_different += draws.different
        self._metrics |= draws.metrics()
        return draws

    def different_tokens(self) -> dict[str, list[int]] | None:
        """Request -> positions in its response whose bits or experts differ, [] for none, of all that were compared
        last; None where nothing was compared since ``begin``."""
        if not self.evidence.indices:
            return None
        samples = [self._samples[i] for i in self.evidence.indices]
        return different_tokens(samples, self.evidence.logprobs, self.evidence.routes)

    def totals(self) -> str:
        """What was compared since the start, and what differed."""
        if not self.total_compared:
            return "nothing compared"
        text = f"{self.total_compared} log-probabilities compared, {self.total_different} different"
        if self.total_routes:
            text += f"; {self.total_routes} routes compared, {self.total_routes_different} different"
        if self.total_redrawn:
            text += f"; {self.total_redrawn} draws repeated, {self.total_redrawn_different} different"
        return text

    def metrics(self) -> dict[str, float]:
        """``bitwise/*``, ``training/rollout_probs_diff_*``, ``rollout_corr/*`` and the time of the last check."""
        return self._metrics
