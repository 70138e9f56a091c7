"""Gradients of micro-batches summed one after another, in the order of their index, whatever the number of ranks.

((m0 + m1) + m2) + ... in fp32 is what one process does as it goes. With W ranks, micro-batches jW to jW + W - 1 are
computed side by side in round j. Instead of adding them in an order of its own, as a reduce-scatter does, every rank
receives its rows of all W gradients and adds them, in the order of ranks, onto the sum of the rounds before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vexact.training.parallel.expert_parallel import DistributedExperts
from vexact.training.parallel.ordered_sum import OrderedSum

MAX_RECEIVED = 1 << 26
"""Elements received at a time, over all ranks: 256 MiB, while the rows of an embedding of 8 B parameters are 2.5 GB."""


class GradientSum:
    """The sum over one mini-batch. With one rank nothing is to be done: a backward adds to ``.grad``."""

    def __init__(self, model: nn.Module, world_size: int) -> None:
        self._world_size, self._model = world_size, model
        self._missing = 0
        self._parts: list[OrderedSum] = []
        if world_size > 1:
            for module in model.modules():
                if isinstance(module, DistributedExperts):
                    self._parts += module.sums
                if isinstance(module, FSDPModule):
                    part = _OrderedReduceScatter()
                    module.set_custom_reduce_scatter(part)  # type: ignore[arg-type]
                    self._parts.append(part)

    def start(self, num_leaves: int) -> None:
        """Forgets the last mini-batch; this one has so many gradients to be added over all ranks.

        They are one for each micro-batch, or where S ranks share each, S for each.
        """
        self._missing = num_leaves
        self.release()

    def next_round(self) -> None:
        """Call before every backward. Ranks beyond the last micro-batch run a filler whose gradient is not added."""
        if not self._parts:
            return
        for parameter in self._model.parameters():
            parameter.grad = None  # the parts hold the sum and FSDP would add it a second time
        leaves = min(self._world_size, self._missing)
        self._missing -= leaves
        for part in self._parts:
            part.expect(leaves)

    def release(self) -> None:
        """Frees all gradients."""
        for parameter in self._model.parameters():
            parameter.grad = None
        for part in self._parts:
            part.reset()


class _OrderedReduceScatter(OrderedSum):
    """FSDP2's reduce-scatter of one module: its rows of all ranks' gradients, added in order onto those before.

    FSDP2 would have the mean taken; it is ignored, since a loss has the denominators of the whole mini-batch. On a GPU
    all of this runs in FSDP2's reduce-scatter stream, which also owns the memory, and waits for the default stream
    before each call: the sum of the last round is never overwritten while it is read.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        leaves = self.take()
        assert input_tensor.dtype == torch.float32, "gradients are summed in float32"
        by_rank = input_tensor.view(group.size(), -1)
        width = max(1, MAX_RECEIVED // group.size())
        for start in range(0, by_rank.shape[1], width):
            columns = slice(start, start + width)
            sent = by_rank[:, columns].contiguous()
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=group)
            total = output_tensor[columns]
            first, *others = received[:leaves]
            if self._total is None:
                total.copy_(first)
            else:
                torch.add(self._total[columns], first, out=total)
            for piece in others:
                total.add_(piece)
        self._total = output_tensor
