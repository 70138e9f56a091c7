"""What every policy loss receives and returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PolicyLossInputs:
    """The response tokens of some sequences, packed one sequence after another.

    ``logprobs`` carries the gradient; ``old_logprobs`` are those the rollout sampled with.
    """

    logprobs: Tensor  # (T,) fp32
    old_logprobs: Tensor  # (T,) fp32
    advantages: Tensor  # (T,) fp32
    lengths: Tensor  # (N,) int64 response tokens of each sequence


@dataclass(frozen=True, slots=True, eq=False)
class PolicyLossOutput:
    """Per-token losses and per-token metrics.

    A metric is reported as its mean over the tokens of the whole mini-batch, so neither depends on how the mini-batch
    was cut into micro-batches.
    """

    losses: Tensor  # (T,) fp32, with gradient
    metrics: dict[str, Tensor]  # verl's name without the "actor/" prefix -> (T,) fp32, detached


@dataclass(frozen=True, slots=True)
class PolicyLossConfig:
    """verl's clipping keys; ``clip_ratio`` stands in for a low or high side that is None."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = None
    clip_ratio_high: float | None = None
    clip_ratio_c: float = 3.0

    def __post_init__(self) -> None:
        """Raises ValueError naming the key whose value makes no sense."""
        if not 0 < self.low < 1:
            raise ValueError(f"actor.clip_ratio_low must be in (0, 1), got {self.low}")
        if self.high <= 0:
            raise ValueError(f"actor.clip_ratio_high must be positive, got {self.high}")
        if self.clip_ratio_c <= 1:
            raise ValueError(f"actor.clip_ratio_c must be greater than 1, got {self.clip_ratio_c}")

    @property
    def low(self) -> float:
        return self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low

    @property
    def high(self) -> float:
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
