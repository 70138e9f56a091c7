"""Trainer to rollout: new weights in, and proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor, nn

from vexact.weights.fingerprint import checksum


class WeightSource(Protocol):
    """The trainer's side: ``vexact.training.Actor``."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...


class WeightTarget(Protocol):
    """The rollout's side: ``vexact.rollout.Engine``."""

    @property
    def model(self) -> nn.Module: ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...


class WeightSyncError(RuntimeError):
    """The rollout does not hold the bits that the trainer sent."""


def sync_weights(actor: WeightSource, engine: WeightTarget, version: int) -> dict[str, float]:
    """Streams the actor's weights into the engine as ``version``, one tensor at a time, and checks every one of them.

    Returns ``rollout/weights_bytes``. Raises WeightSyncError naming the first
    tensor whose bits in the engine differ from those sent; the engine raises ValueError for tensors that do not fit.
    """
    sent: dict[str, int] = {}
    num_bytes = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_bytes
        for name, tensor in actor.named_weights():
            sent[name] = checksum(tensor)
            num_bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    engine.update_weights(stream(), version)
    held = dict(engine.model.named_parameters())
    for name, expected in sent.items():
        got = checksum(held[name]) if name in held else None
        if got != expected:
            raise WeightSyncError(
                f"weights version {version}: {name} has checksum {got} in the rollout, the trainer sent {expected}; "
                "its samples would not be the trainer's"
            )
    return {"rollout/weights_bytes": float(num_bytes)}
