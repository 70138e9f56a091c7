"""What every advantage estimator receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.algorithms.packed import segment_sum


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageInputs:
    """Outcome rewards of N sequences whose T response tokens are packed one sequence after another.

    ``kl_penalty`` is the penalty of every token, already multiplied by its coefficient; it is *subtracted* from the
    token rewards (the outcome reward sits on the last token).

    >>> AdvantageInputs(torch.tensor([1.0, 0.0]), torch.tensor([7, 7]), torch.tensor([3, 2])).num_tokens
    5
    """

    rewards: Tensor  # (N,) floating point
    group_ids: Tensor  # (N,) int64: sequences of one prompt share an id; any integers, in any order
    lengths: Tensor  # (N,) int64 response tokens, each at least 1
    kl_penalty: Tensor | None = None  # (T,) floating point

    def __post_init__(self) -> None:
        """Raises ValueError on mismatched shapes, empty responses and rewards that are not finite."""
        shapes = {tuple(t.shape) for t in (self.rewards, self.group_ids, self.lengths)}
        if len(shapes) != 1 or self.rewards.dim() != 1 or self.rewards.numel() == 0:
            raise ValueError(f"rewards, group_ids and lengths must share one shape (N,), N >= 1, got {sorted(shapes)}")
        if bool((self.lengths < 1).any()):
            row = int((self.lengths < 1).nonzero()[0])
            raise ValueError(f"sequence {row} has {int(self.lengths[row])} response tokens; every response needs one")
        if not bool(torch.isfinite(self.rewards).all()):
            row = int((~torch.isfinite(self.rewards)).nonzero()[0])
            raise ValueError(f"reward of sequence {row} is {float(self.rewards[row])}; a reward must be finite")
        if self.kl_penalty is not None and tuple(self.kl_penalty.shape) != (self.num_tokens,):
            raise ValueError(f"kl_penalty must have shape ({self.num_tokens},), got {tuple(self.kl_penalty.shape)}")

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def token_rewards(self) -> Tensor:
        """Reward on the last token, minus the penalty of every token: (T,) fp64."""
        tokens = torch.zeros(self.num_tokens, dtype=torch.float64, device=self.rewards.device)
        tokens[self.lengths.cumsum(0) - 1] = self.rewards.double()
        return tokens if self.kl_penalty is None else tokens - self.kl_penalty.double()

    def outcomes(self) -> Tensor:
        """Sum of the token rewards of every sequence: (N,) fp64."""
        if self.kl_penalty is None:
            return self.rewards.double()
        return self.rewards.double() - segment_sum(self.kl_penalty.double(), self.lengths)

    def per_token(self, values: Tensor) -> Tensor:
        """Repeats one value per sequence over its tokens: (N,) -> (T,) fp32."""
        return torch.repeat_interleave(values, self.lengths).float()


@dataclass(frozen=True, slots=True)
class AdvantageConfig:
    """verl's ``algorithm.*`` keys that the estimators read."""

    gamma: float = 1.0
    norm_adv_by_std_in_grpo: bool = True
