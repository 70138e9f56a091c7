"""One host-to-device copy per step, however many arrays the step needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_ALIGNMENT = 16  # bytes; keeps every device view aligned for vector loads


class StagingBuffer:
    """Packs numpy arrays into one pinned buffer and copies that to the device.

    The buffer is reused: a copy first waits until the one before it has left the buffer. A step that only fills the
    cache has no result the engine would wait for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = self._new(1 << 16)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def _new(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """New device tensors with the values, shapes and dtypes of ``arrays``."""
        target = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=self._device)
        self.copy(arrays, target)
        return unpack(target, arrays)

    def copy(self, arrays: Mapping[str, np.ndarray], target: torch.Tensor) -> None:
        """Overwrites ``target`` (packed_bytes(arrays),) uint8 on the device; ``unpack`` shows the arrays in it."""
        offsets, total = _layout(arrays)
        if self._copied is not None:
            self._copied.synchronize()
        if total > self._host.numel():
            self._host = self._new(2 * total)
        host = self._host.numpy()
        for name, array in arrays.items():
            view = host[offsets[name] : offsets[name] + array.nbytes].view(array.dtype)
            view.reshape(array.shape)[...] = array
        target.copy_(self._host[:total], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def packed_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes that ``StagingBuffer.copy`` writes."""
    return _layout(arrays)[1]


def unpack(packed: torch.Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Views of ``packed`` with the names, shapes and dtypes of ``arrays``."""
    offsets, _ = _layout(arrays)
    return {
        name: packed[offsets[name] : offsets[name] + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for name, array in arrays.items()
    }


def _layout(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    total = 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, total


_TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}


def _torch_dtype(array: np.ndarray) -> torch.dtype:
    return _TORCH_DTYPES[array.dtype.name]
