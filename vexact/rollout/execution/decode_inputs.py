"""The inputs of captured decode steps: tensors that stay where they are, and what fills the rows nobody needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from vexact.rollout.execution.decode_buckets import GraphKey
from vexact.rollout.execution.runner_inputs import RunnerInputs
from vexact.rollout.execution.staging import PinnedBuffer, packed_bytes, unpack
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
        self._static: dict[GraphKey, _GraphInputs] = {}

    def load(self, batch: Batch, key: GraphKey) -> RunnerInputs:
        """Fill the tensors of ``key`` with a pure decode step and padding, every element of them."""
        if key not in self._static:
            self._static[key] = _GraphInputs(self._blank(batch, key), key, self._device)
        return self._static[key].load(batch, self._padding)

    def _blank(self, batch: Batch, key: GraphKey) -> dict[str, np.ndarray]:
        """Arrays of the shapes and dtypes that the graph reads."""
        num_rows = key.batch_size
        arrays = {name: np.zeros(num_rows, getattr(batch, name).dtype) for name in self._padding}
        arrays["block_table"] = np.zeros((num_rows, -(-key.num_keys // self._page_size)), np.int32)
        arrays["cu_seqlens_q"] = np.arange(num_rows + 1, dtype=np.int32)
        return arrays


class _GraphInputs:
    """What one graph reads: on the device, and twice on the host, where one is filled while the other is copied."""

    def __init__(self, arrays: dict[str, np.ndarray], key: GraphKey, device: torch.device) -> None:
        self.buffer = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=device)
        self._inputs = RunnerInputs.of(
            unpack(self.buffer, arrays),
            max_seqlen_q=1,
            max_seqlen_k=key.num_keys,
            num_sampled=key.batch_size,
            all_rows_sampled=True,
            graph=key,
        )
        self._hosts = cycle([_HostInputs(arrays, device), _HostInputs(arrays, device)])

    def load(self, batch: Batch, padding: Mapping[str, int]) -> RunnerInputs:
        next(self._hosts).copy_to(self.buffer, batch, padding)
        return replace(self._inputs, num_sampled=batch.num_tokens)


class _HostInputs:
    """Pinned memory in the layout of a graph's inputs."""

    def __init__(self, arrays: dict[str, np.ndarray], device: torch.device) -> None:
        self._pinned = PinnedBuffer(device)
        self._packed = self._pinned.bytes(packed_bytes(arrays))
        self._rows = {name: view.numpy() for name, view in unpack(self._packed, arrays).items()}
        self._rows["cu_seqlens_q"][:] = arrays["cu_seqlens_q"]
        self._table = self._rows["block_table"]

    def copy_to(self, target: Tensor, batch: Batch, padding: Mapping[str, int]) -> None:
        """The arrays of ``batch``, one new and sampled token per sequence, and padding in the rows beyond."""
        self._pinned.wait()
        num_real, table = batch.num_tokens, self._table
        for name, fill in padding.items():
            rows = self._rows[name]
            rows[:num_real] = getattr(batch, name)
            rows[num_real:] = fill
        num_pages = min(table.shape[1], batch.block_table.shape[1])  # pages held in advance may be more than are read
        table[:num_real, :num_pages] = batch.block_table[:, :num_pages]
        table[:num_real, num_pages:] = NO_PAGE
        table[num_real:] = NO_PAGE
        target.copy_(self._packed, non_blocking=True)
        self._pinned.record()
