"""What is corrected, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before the exponential, as in verl."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A statistic, by verl's name, and the bounds, inclusive, that it must lie in for a token to be kept.

    A name is ``token``, ``seq_sum``, ``seq_mean`` or ``seq_max`` with ``_k1``, ``_k2`` or ``_k3``.

    The bounds of a k1 statistic (-d) are ratios pi_rollout / pi and have a lower side; those of k2 and k3 are nats.
    """

    statistic: str
    upper: float
    lower: float | None = None


@dataclass(frozen=True, slots=True)
class CorrectionConfig:
    """verl's ``algorithm.rollout_correction``, parsed.

    ``bypass``: pi is the policy being trained, at every optimizer step; without it pi is the old policy, once per
    update. ``weights_apply``: whether the policy loss is multiplied by the weights; a loss that holds the ratio
    pi / pi_rollout already only has them reported.
    """

    level: str | None = None  # "token" or "sequence": of the importance weights
    upper: float = 2.0
    lower: float | None = None  # with it, weights outside of the bounds are 0; without, they are cut at ``upper``
    batch_normalize: bool = False
    rejections: tuple[Rejection, ...] = ()
    veto: float | None = None  # a token whose ratio pi / pi_rollout is below rejects its sequence
    bypass: bool = True
    weights_apply: bool = True

    @property
    def is_on(self) -> bool:
        return self.level is not None or bool(self.rejections) or self.veto is not None
