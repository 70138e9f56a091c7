"""The inputs of captured decode steps: tensors that stay where they are, and what fills the rows nobody needs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vexact.rollout.execution.decode_buckets import GraphKey
from vexact.rollout.execution.runner_inputs import RunnerInputs
from vexact.rollout.execution.staging import StagingBuffer, packed_bytes, unpack
from vexact.rollout.scheduling.batch import Batch
from vexact.rollout.scheduling.state import NO_PAGE

_NO_SLOT = -1  # keys and values of such a row are written nowhere
# A row without keys that is decoded greedily: it touches no page, and the sampler does the least it can.
_PADDING = {
    "input_ids": 0,
    "positions": 0,
    "sample_slots": 0,  # of which only the real ones are used
    "slot_mapping": _NO_SLOT,
    "seqused_k": 0,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "seed": 0,
    "sample_positions": 0,
}


class DecodeInputs:
    """One set of device tensors per graph, overwritten by one copy per step."""

    def __init__(self, device: torch.device, page_size: int, num_slots: int) -> None:
        self._device = device
        self._page_size = page_size
        self._padding = _PADDING | {"token_sources": num_slots}
        self._staging = StagingBuffer(device)
        self._static: dict[GraphKey, tuple[Tensor, RunnerInputs]] = {}

    def load(self, batch: Batch, key: GraphKey) -> RunnerInputs:
        """Fill the tensors of ``key`` with a pure decode step and padding, every element of them."""
        arrays = self._padded_arrays(batch, key)
        if key not in self._static:
            self._static[key] = self._allocate(arrays, key)
        buffer, inputs = self._static[key]
        self._staging.copy(arrays, buffer)
        return replace(inputs, num_sampled=batch.num_tokens)

    def _allocate(self, arrays: dict[str, np.ndarray], key: GraphKey) -> tuple[Tensor, RunnerInputs]:
        buffer = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=self._device)
        inputs = RunnerInputs.of(
            unpack(buffer, arrays),
            max_seqlen_q=1,
            max_seqlen_k=key.num_keys,
            num_sampled=key.batch_size,
            all_rows_sampled=True,
            graph=key,
        )
        return buffer, inputs

    def _padded_arrays(self, batch: Batch, key: GraphKey) -> dict[str, np.ndarray]:
        """The arrays of ``batch``, one new and sampled token per sequence, with ``key.batch_size`` rows."""
        num_rows, num_real = key.batch_size, batch.num_tokens
        arrays = {name: _padded(getattr(batch, name), num_rows, fill) for name, fill in self._padding.items()}
        table = np.full((num_rows, -(-key.num_keys // self._page_size)), NO_PAGE, np.int32)
        num_pages = min(table.shape[1], batch.block_table.shape[1])  # pages held in advance may be more than are read
        table[:num_real, :num_pages] = batch.block_table[:, :num_pages]
        arrays["block_table"] = table
        arrays["cu_seqlens_q"] = np.arange(num_rows + 1, dtype=np.int32)
        return arrays


def _padded(values: np.ndarray, num_rows: int, fill: int) -> np.ndarray:
    out = np.full(num_rows, fill, values.dtype)
    out[: len(values)] = values
    return out
