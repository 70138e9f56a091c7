"""REINFORCE++: discounted token returns, normalised over the whole batch instead of per prompt."""

from __future__ import annotations

from torch import Tensor

from vexact.algorithms.advantages.inputs import AdvantageConfig, AdvantageInputs
from vexact.algorithms.packed import discounted_returns, whiten


def reinforce_plus_plus(inputs: AdvantageInputs, config: AdvantageConfig) -> Tensor:
    """Returns-to-go of the token rewards (KL penalty included), whitened over all tokens; (T,) fp32.

    https://arxiv.org/abs/2501.03262. Raises ValueError when the batch has a single token.
    """
    return whiten(discounted_returns(inputs.token_rewards(), inputs.lengths, config.gamma)).float()
