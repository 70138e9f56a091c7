"""One host-to-device copy per step, however many arrays the step needs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import torch

_ALIGNMENT = 16  # bytes; keeps every device view aligned for vector loads


class PinnedBuffer:
    """Host memory for copies to or from ``device`` that nobody waits for, and the last of these copies."""

    def __init__(self, device: torch.device) -> None:
        self._is_pinned = device.type == "cuda"
        self._memory = self._new(1 << 16)
        self._copied = torch.cuda.Event() if self._is_pinned else None

    def _new(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)

    def bytes(self, count: int) -> torch.Tensor:
        """(count,) uint8. Nothing may be on its way to or from the buffer: see ``wait``."""
        if count > self._memory.numel():
            self._memory = self._new(2 * count)
        return self._memory[:count]

    def record(self) -> None:
        """The copy that ``wait`` waits for has been launched."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Until what was launched before the last ``record`` is done."""
        if self._copied is not None:
            self._copied.synchronize()


class StagingBuffer:
    """Packs numpy arrays into one pinned buffer and copies that to the device.

    There are two buffers, used in turn: while the device reads one, the host fills the other for the step to come. A
    copy first waits until the one before the last has left its buffer.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = cycle([PinnedBuffer(device), PinnedBuffer(device)])

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """New device tensors with the values, shapes and dtypes of ``arrays``."""
        target = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=self._device)
        self.copy(arrays, target)
        return unpack(target, arrays)

    def copy(self, arrays: Mapping[str, np.ndarray], target: torch.Tensor) -> None:
        """Overwrites ``target`` (packed_bytes(arrays),) uint8 on the device; ``unpack`` shows the arrays in it."""
        buffer = next(self._buffers)
        buffer.wait()
        packed = buffer.bytes(packed_bytes(arrays))
        for name, view in unpack(packed, arrays).items():
            view.numpy()[...] = arrays[name]
        target.copy_(packed, non_blocking=True)
        buffer.record()


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
