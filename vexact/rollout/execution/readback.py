"""What a step sampled, on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from vexact.rollout.execution.staging import PinnedBuffer
from vexact.rollout.sampling.sampler import StepOutput, unpacked


@dataclass(frozen=True, slots=True, eq=False)
class PendingOutput:
    """The output of a step that was launched. Good until the next step but one is launched."""

    _buffer: PinnedBuffer
    _packed: Tensor  # in the buffer
    _num_rows: int

    def wait(self) -> StepOutput:
        """Until the step is done; what it sampled."""
        self._buffer.wait()
        return unpacked(self._packed.numpy()[:, : self._num_rows].copy())


class Readback:
    """Two buffers, used in turn: one step's output is read while that of the next is awaited."""

    def __init__(self, device: torch.device) -> None:
        self._buffers = cycle([PinnedBuffer(device), PinnedBuffer(device)])

    def start(self, packed: Tensor, num_rows: int) -> PendingOutput:
        """Launch the copy of ``packed``, which ``sample_tokens`` returned; its first ``num_rows`` columns are real."""
        buffer = next(self._buffers)
        host = buffer.bytes(packed.nbytes).view(packed.dtype).view(packed.shape)
        host.copy_(packed, non_blocking=True)
        buffer.record()
        return PendingOutput(buffer, host, num_rows)
