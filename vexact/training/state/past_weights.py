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
        self._spare: list[list[Tensor]] = []  # memory of versions that are forgotten: the next ones need no new
        self._present: list[Tensor] = []  # the same for what steps aside

    def advance(self, version: int, keep: bool) -> None:
        """The weights are now ``version``: copies them, if they are to be kept, and forgets what is too old."""
        for old in [old for old in self._kept if not version - DEPTH < old < version]:
            self._spare.append(self._kept.pop(old))
        if keep:
            parts = self._parts()
            self._kept[version] = self._spare.pop() if self._spare else host_rows(parts, self._dtypes)
            _copy(parts, self._kept[version])

    @contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """Within it the model has the weights of ``version``, which must have been kept."""
        past, parts = self._kept[version], self._parts()
        self._present = self._present or host_rows(parts)
        _copy(parts, self._present)
        try:
            self._put(past)
            yield
        finally:
            self._put(self._present)

    def _parts(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self._model.parameters()]

    def _put(self, values: list[Tensor]) -> None:
        for part, value in zip(self._parts(), values, strict=True):
            part.copy_(value.to(part.device, non_blocking=True))  # cast where the weights are


def _copy(parts: list[Tensor], held: list[Tensor]) -> None:
    """Into host memory, cast where the parts are."""
    for host, part in zip(held, parts, strict=True):
        host.copy_(part.to(host.dtype), non_blocking=True)
    for device in {part.device for part in parts if part.is_cuda}:
        torch.cuda.synchronize(device)
