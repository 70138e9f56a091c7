"""Parts (b) and (c): how close the training side is to a stock transformers model, forward and backward.

Closeness, not equality: torch's own kernels round in another order. Two models in a 16-bit dtype differ by the errors
of both, so each is also compared with transformers in float32, which stands for the truth here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vexact.audit.verify.gradients import Gradients, compare_gradients
from vexact.audit.verify.logits import Closeness, compare_logits
from vexact.audit.verify.sides import TrainingSide
from vexact.types import Sample

LEAST_ARGMAX = 0.995
LEAST_COSINE = 0.999


@dataclass(frozen=True, slots=True)
class Native:
    """One side against one transformers model."""

    closeness: Closeness
    gradients: Gradients


@dataclass(frozen=True, slots=True)
class NativeComparisons:
    """Training side, transformers in the same dtype, and transformers in float32, each against each."""

    same: Native  # the training side and transformers in its dtype
    float32: Native | None  # the training side and transformers in float32; None when ``same`` is that
    yardstick: Native | None  # transformers in the dtype and transformers in float32; None when they are the same

    @property
    def argmax(self) -> float:
        """The figure that LEAST_ARGMAX judges: agreement with transformers in the same dtype."""
        return self.same.closeness.argmax_agreement

    @property
    def cosine(self) -> float:
        """The figure that LEAST_COSINE judges: all gradients as one vector against the float32 gradient."""
        return (self.float32 or self.same).gradients.cosine

    @property
    def agrees(self) -> bool:
        """Information: the exit code does not depend on it. A figure that is not a number does not agree."""
        return self.argmax >= LEAST_ARGMAX and self.cosine >= LEAST_COSINE


def compare_native(
    side: TrainingSide, hf: Any, samples: Sequence[Sample], fused: bool, dtype: torch.dtype, device: torch.device
) -> Native:
    """Logits and gradients of ``side``, which computes in ``dtype``, against those of a stock transformers model."""
    closeness = compare_logits(side, hf, samples, dtype, device)
    return Native(closeness, compare_gradients(side, hf, samples, fused, device))
