"""Sampled tokens against those drawn again from the trainer's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vexact.training.passes.redraw import Redrawn
from vexact.types import Sample


@dataclass(frozen=True, slots=True)
class DrawDifference:
    """One response token that a repeated draw does not give, or gives from another kept set."""

    request_id: str
    position: int  # index in the response
    sampled: int
    redrawn: int
    sampled_min_logit: float
    redrawn_min_logit: float


@dataclass(frozen=True, slots=True)
class DrawComparison:
    """What one update's repeated draws gave."""

    redrawn: int
    different: int  # another token, or another kept set
    kept_sets_different: int
    greedy: bool  # every other token is the most likely one
    where: tuple[tuple[str, int], ...]  # (request, response position) of every difference
    first: DrawDifference | None

    def metrics(self) -> dict[str, float]:
        """``bitwise/tokens_redrawn`` and ``bitwise/tokens_redrawn_different``."""
        return {
            "bitwise/tokens_redrawn": float(self.redrawn),
            "bitwise/tokens_redrawn_different": float(self.different),
        }

    def describe(self) -> str:
        """One paragraph naming the first difference and where to look."""
        first = self.first
        assert first is not None, "only a failed comparison has something to describe"
        return (
            f"the rollout does not draw what its seeds say: of {self.redrawn} tokens drawn again from the trainer's "
            f"logits, {self.different} differ. First: request {first.request_id}, response position {first.position}, "
            f"sampled token {first.sampled}, drawn again {first.redrawn}. {self._hint(first)}"
        )

    def _hint(self, first: DrawDifference) -> str:
        if self.kept_sets_different:
            return (
                f"The kept set differs in {self.kept_sets_different} of them (there, smallest kept logit "
                f"{first.sampled_min_logit!r} when sampled, {first.redrawn_min_logit!r} now): look at top_k, top_p, "
                "min_p and the temperature of the sampler"
            )
        if self.greedy:
            return "Every one of them was sampled as the most likely token: the sampler seems to ignore its noise"
        return "The logits agree, so look at the seed, the request id, the position and the sampler's noise"


def compare_draws(samples: Sequence[Sample], drawn: Redrawn) -> DrawComparison:
    """
    Args:
        samples: all samples of the update, in its order.
        drawn: K draws that were repeated.
    """
    if not len(drawn.sequences):
        return DrawComparison(0, 0, 0, False, (), None)
    pairs = list(zip(drawn.sequences.tolist(), drawn.positions.tolist(), strict=True))
    token_ids = np.array([samples[i].token_ids[at] for i, at in pairs])
    min_logits = np.array([samples[i].min_logits[at] for i, at in pairs], np.float32)
    other_set = min_logits.view(np.int32) != drawn.min_logits.view(np.int32)
    where = np.flatnonzero((token_ids != drawn.token_ids) | other_set)
    if not len(where):
        return DrawComparison(len(pairs), 0, 0, False, (), None)
    one = int(np.flatnonzero(other_set)[0] if other_set.any() else where[0])
    sequence, position = pairs[one]
    first = DrawDifference(
        samples[sequence].request_id,
        position,
        int(token_ids[one]),
        int(drawn.token_ids[one]),
        float(min_logits[one]),
        float(drawn.min_logits[one]),
    )
    greedy = bool((token_ids[where] == drawn.best_ids[where]).all())
    named = tuple((samples[pairs[i][0]].request_id, pairs[i][1]) for i in where.tolist())
    return DrawComparison(len(pairs), len(where), int(other_set.sum()), greedy, named, first)
