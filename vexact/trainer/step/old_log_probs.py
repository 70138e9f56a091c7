"""Old log-probabilities by the trainer's own forward: what a framework needs whose rollout computes other bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vexact.config import Config
from vexact.report import Timers
from vexact.training.protocol import Policy
from vexact.types import SampleGroup, TrainSequence


def recompute_old_log_probs(
    config: Config, groups: Sequence[SampleGroup], actor: Policy, timers: Timers
) -> list[np.ndarray] | None:
    """One forward without gradients over all samples, timed as ``old_log_prob``.

    Returns:
        Per sample, group-major, (R,) fp32 under the weights before the update; None, and nothing is computed, unless
        ``algorithm.recompute_old_log_prob`` is set.
    """
    if not config.algorithm.recompute_old_log_prob:
        return None
    samples = [sample for group in groups for sample in group.samples]
    sequences = [TrainSequence(sample, np.zeros(len(sample.token_ids), np.float32)) for sample in samples]
    with timers("old_log_prob"):
        return actor.logprobs(sequences)
