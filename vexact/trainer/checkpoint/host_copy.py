"""A copy of tensors in the host's memory, taken while training waits and written while it goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vexact.training.optim.page_locked import page_locked

_MOST_BYTES = 1 << 28  # of one buffer


class HostCopy:
    """Keeps its buffers for the next copy: locking pages takes longer than copying into them."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._done: torch.cuda.Event | None = None

    def take(self, tensors: Iterable[Tensor]) -> list[list[Tensor]]:
        """Begins to copy the tensors; returns the bytes of each, in pieces that are valid after ``wait`` and until the
        next copy. What changes the tensors later on the same stream comes after the copy.
        """
        flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        cuda = next((tensor.device for tensor in flat if tensor.is_cuda), None)
        size = min(_MOST_BYTES, 1 << max(0, sum(map(len, flat)) - 1).bit_length())
        number, used = 0, 0
        pieces: list[list[Tensor]] = []
        for tensor in flat:
            pieces.append([])
            while len(tensor):
                if number == len(self._buffers):
                    self._buffers.append(torch.empty(size, dtype=torch.uint8) if cuda is None else page_locked(size))
                buffer = self._buffers[number]
                count = min(len(tensor), len(buffer) - used)
                piece = buffer[used : used + count]
                piece.copy_(tensor[:count], non_blocking=True)
                pieces[-1].append(piece)
                tensor, used = tensor[count:], used + count
                if used == len(buffer):
                    number, used = number + 1, 0
        if cuda is not None:
            with torch.cuda.device(cuda):
                self._done = torch.cuda.Event()
                self._done.record()
        return pieces

    def wait(self) -> None:
        """Until the copy is whole."""
        if self._done is not None:
            self._done.synchronize()
