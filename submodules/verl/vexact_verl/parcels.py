"""Tensors on their way from one process to another on the same machine: bytes, or on a GPU a handle to its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from vexact.weights.fingerprint import checksum

_DEVICE_ARGUMENT = 6  # of the function that opens a CUDA handle


@dataclass(frozen=True, slots=True)
class Parcel:
    """One tensor. A handle is good while the sender keeps the tensor: until the receiver has answered."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: int
    content: np.ndarray | tuple[Callable[..., Tensor], tuple[Any, ...]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Parcel:
        tensor = tensor.detach().contiguous()
        content: Any = reduce_tensor(tensor) if tensor.is_cuda else tensor.view(-1).view(torch.uint8).numpy()
        return cls(name, tuple(tensor.shape), tensor.dtype, checksum(tensor), content)

    def open(self) -> Tensor:
        """The tensor; it shares the sender's memory on a GPU."""
        if isinstance(self.content, np.ndarray):
            return torch.from_numpy(self.content.copy()).view(self.dtype).view(self.shape)
        rebuild, arguments = self.content
        own = list(arguments)
        own[_DEVICE_ARGUMENT] = torch.cuda.current_device()  # the same GPU may have another number here
        return rebuild(*own)
