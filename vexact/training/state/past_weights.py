"""Weights of an earlier version, so that samples older than the trainer can still be compared bit for bit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vexact.training.parallel.ranks import local


class PastWeights:
    """Keeps this rank's part of the last weights versions on the host, in the dtype that forwards compute in.

    The rollout got these very bits. Casting them to the master copy's dtype and back loses nothing.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, depth: int) -> None:
        """``depth``: how many versions are kept."""
        self._model, self._dtype, self._depth = model, dtype, depth
        self._kept: OrderedDict[int, list[Tensor]] = OrderedDict()

    def keep(self, version: int) -> None:
        """Copies the weights as they are now."""
        self._kept[version] = [part.to(self._dtype).to("cpu", copy=True) for part in self._parts()]
        while len(self._kept) > self._depth:
            self._kept.popitem(last=False)

    @contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """Within it the model has the weights of ``version``. Raises KeyError naming the versions there are."""
        if version not in self._kept:
            raise KeyError(f"weights of version {version} are not kept any more, only of {list(self._kept)}")
        present = [part.to("cpu", copy=True) for part in self._parts()]
        try:
            self._put(self._kept[version])
            yield
        finally:
            self._put(present)

    def _parts(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self._model.parameters()]

    def _put(self, values: list[Tensor]) -> None:
        for part, value in zip(self._parts(), values, strict=True):
            part.copy_(value)
