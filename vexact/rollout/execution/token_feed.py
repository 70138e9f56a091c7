"""Tokens that go from one step to the next without a detour over the host."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenFeed:
    """The last token that each slot has sampled, on the device."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._last = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)  # the one beyond stays 0

    def fill(self, input_ids: Tensor, sources: Tensor) -> Tensor:
        """(T,) int64: ``input_ids``, and where they are 0 the last token of the slot ``sources`` (T,) int64.

        ``sources`` is the number of slots where the host knew the id. Writes nothing, so a graph may hold it.
        """
        return input_ids + self._last.index_select(0, sources)

    def keep(self, slots: Tensor, token_ids: Tensor) -> None:
        """``token_ids`` (S,) int32 are the last of ``slots`` (S,) int64 from now on."""
        self._last.index_copy_(0, slots, token_ids)
