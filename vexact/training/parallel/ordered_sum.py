"""What one tensor's gradients add up to, micro-batch after micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class OrderedSum:
    """((m0 + m1) + m2) + ... in fp32, of gradients that come in rounds."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._leaves = 0

    def reset(self) -> None:
        self._total, self._leaves = None, 0

    def expect(self, leaves: int) -> None:
        """So many gradients of the next round count; those after them are fillers'."""
        self._leaves = leaves

    def take(self) -> int:
        """The gradients that count in this round, which has come."""
        assert self._leaves > 0, "a backward outside an update, or a second one of a module in one round"
        leaves, self._leaves = self._leaves, 0
        return leaves

    def accumulate(self, like: Tensor, add: Callable[[Tensor, int, bool], None]) -> Tensor:
        """``add(total, leaves, fresh)`` adds a round's first ``leaves`` pieces to the sum where it lies; when it is
        ``fresh``, the sum's values are unknown, and it becomes theirs. Returns the sum so far, of the shape and on the
        device of ``like``."""
        leaves, fresh = self.take(), self._total is None
        total = like.new_empty(like.shape, dtype=torch.float32) if self._total is None else self._total
        add(total, leaves, fresh)
        self._total = total
        return total

    def add(self, pieces: Iterable[Tensor]) -> Tensor:
        """Adds a round and returns the sum so far, which it goes on to use. All pieces are taken, some not added."""
        leaves = self.take()
        for index, piece in enumerate(pieces):
            if index >= leaves:
                continue
            if self._total is None:
                self._total = piece.to(torch.float32, copy=True)
            else:
                self._total.add_(piece)
        assert self._total is not None, "a round has a first piece"
        return self._total
