"""Weights for a rollout that keeps them in its own way: it gets whole tensors, and proves that it uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vexact.weights.errors import WeightSyncError
from vexact.weights.manifest import Manifest


@runtime_checkable
class WeightTaker(Protocol):
    """A rollout whose tensors are not ours to write and to compare."""

    @property
    def device(self) -> torch.device: ...

    @property
    def weights_version(self) -> int: ...

    def check_updatable(self) -> None:
        """Raises RuntimeError while requests are unfinished: their samples would mix two versions."""
        ...

    def take_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
        """Computes with these weights from now on, as ``version``, and has proved it. Returns metrics.

        The tensors come in the model's order and under its names (``vexact.models.hf_names.to_hf`` gives Hugging
        Face's), whole and in the compute dtype. They may share the trainer's memory: copy what outlives the call.

        Raises:
            WeightSyncError: it does not hold what was sent; it then refuses to generate until an update succeeds.
        """
        ...


def hand_over(taker: WeightTaker, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> dict[str, float]:
    """``take_weights`` of tensors that several ranks gather together: they are all gathered, whatever it does.

    Raises WeightSyncError as it does, or if it does not say that it has ``version``.
    """
    num_bytes, tensors = 0, iter(named_tensors)

    def counted() -> Iterable[tuple[str, Tensor]]:
        nonlocal num_bytes
        for name, tensor in tensors:
            num_bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    try:
        metrics = taker.take_weights(counted(), version)
    finally:
        left = sum(1 for _ in tensors)
    if left or taker.weights_version != version:
        raise WeightSyncError(
            f"weights version {version}: the rollout left {left} tensors and says that it has version "
            f"{taker.weights_version}; its samples would not be the trainer's"
        )
    return {"rollout/weights_bytes": float(num_bytes), **metrics}


class Landing:
    """Memory on the device of a ``WeightTaker``, which is given what has arrived there whole."""

    def __init__(self, taker: WeightTaker) -> None:
        self._taker = taker
        self._tensors: dict[str, Tensor] = {}
        self.device = taker.device
        self.metrics: dict[str, float] = {}  # of the last time

    def check_updatable(self) -> None:
        self._taker.check_updatable()

    def parameters(self, specs: Manifest) -> Mapping[str, Tensor]:
        """Where the tensors go."""
        self._tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs}
        return self._tensors

    @contextmanager
    def replacing_weights(self, version: int) -> Iterator[None]:
        """Inside of it they arrive. Raises WeightSyncError as ``hand_over``."""
        try:
            yield
            self.metrics = hand_over(self._taker, self._tensors.items(), version)
        finally:
            self._tensors = {}
