"""The loss that balances the experts, for the sequences of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from vexact.models.config import MoeConfig
from vexact.ops.moe.balance import sequence_loads, with_balance_loss
from vexact.ops.moe.route import Routes


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """B sequences with T tokens on this rank."""

    sequence: Tensor  # (T,) int64, which one a token belongs to; B for none
    lengths: Tensor  # (B,) fp32, tokens of each, wherever they are
    share: float  # of each sequence in the loss
    coefficient: float  # of the loss in what is differentiated
    losses: Tensor  # (layers,) fp64; a layer overwrites its own with the part of this rank's tokens
    total: Callable[[Tensor], Tensor]  # of counts of this rank's tokens: those of all ranks that share the sequences

    def attach(self, routes: Routes, logits: Tensor, layer: int, moe: MoeConfig) -> Routes:
        """``routes``, through whose weights the loss's gradient reaches the ``logits`` (T, E)."""
        counts = self.total(sequence_loads(routes.experts, self.sequence, len(self.lengths), moe.num_experts))
        loads = counts.float() * (moe.num_experts / moe.top_k) / self.lengths.unsqueeze(1)
        weights, values = with_balance_loss(
            routes.weights,
            logits,
            pad(loads, (0, 0, 0, 1)),
            pad(self.share / self.lengths, (0, 1)),
            self.sequence,
            moe.scoring,
            self.coefficient,
        )
        self.losses[layer] = values.double().sum()
        return Routes(routes.experts, weights)
