"""Weights of an earlier version, so that samples older than the trainer can still be compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vexact.models import parameter_dtype
from vexact.training.optim.host_memory import host_rows
from vexact.training.parallel.ranks import local

DEPTH = 2
"""Versions for which weights stay: those that generated the samples being trained on, and those of the next step's."""


class PastWeights:
    """Keeps this rank's part of earlier weights on the host, in the dtype that forwards compute in.

    The rollout got these very bits. Casting them to the master copy's dtype and back loses nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtypes = [parameter_dtype(name, dtype) for name, _ in model.named_parameters()]
        self._kept: dict[int, list[Tensor]] = {}

    def advance(self, version: int, keep: bool) -> None:
        """The weights are now ``version``: copies them, if they are to be kept, and forgets what is too old."""
        self._kept = {old: parts for old, parts in self._kept.items() if version - DEPTH < old < version}
        if keep:
            self._kept[version] = _on_host(self._parts(), self._dtypes)

    @contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """Within it the model has the weights of ``version``, which must have been kept."""
        past, present = self._kept[version], _on_host(self._parts())
        try:
            self._put(past)
            yield
        finally:
            self._put(present)

    def _parts(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self._model.parameters()]

    def _put(self, values: list[Tensor]) -> None:
        for part, value in zip(self._parts(), values, strict=True):
            part.copy_(value.to(part.device, non_blocking=True))  # cast where the weights are


def _on_host(parts: list[Tensor], dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
    """Copies in host memory, cast where the parts are; a GPU's in pinned memory, which torch keeps for the next copies:
    a copy to new pageable memory takes seconds, most of them in page faults."""
    held = host_rows(parts, dtypes)
    for host, part in zip(held, parts, strict=True):
        host.copy_(part.to(host.dtype), non_blocking=True)
    for device in {part.device for part in parts if part.is_cuda}:
        torch.cuda.synchronize(device)
    return held
