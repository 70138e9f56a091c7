"""The counters that programs draw their tiles from: every launch has a zero of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import driver

from vexact.ops.kernels.launches import ALIGNMENT

_AT_ONCE = 256
_WORDS = ALIGNMENT // 4
_zeros: dict[tuple[int, int], list[Tensor]] = {}


def new_counter(device: torch.device) -> Tensor:
    """An int32 zero (1,) on `device`, for one launch on its current stream.

    A kernel that zeroes one costs the host as much as a launch, so zeros are made in blocks, and no zero is used twice:
    launches that overlap, on one stream or several, and one that is never finished leave the others alone. A block
    belongs to a stream, whose order puts the kernel that writes it before the launches that read it, and the memory's
    next owner behind them. What a CUDA graph captures is launched again with the same counter, which the graph
    therefore zeroes itself.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    place = device.index, driver.active.get_current_stream(device.index)
    while True:
        try:
            return _zeros[place].pop()
        except (KeyError, IndexError):  # another thread may take all of a block before this one takes any
            block = torch.zeros((_AT_ONCE, _WORDS), dtype=torch.int32, device=device)
            _zeros[place] = list(block[:, :1].unbind())
