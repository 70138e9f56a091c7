"""What must be a number around an update: its inputs before, its gradients during, weights and moments after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from vexact.models.nonfinite import all_finite, find_nonfinite
from vexact.training.optim.optimizer import MOMENTS, Optimizer
from vexact.training.parallel.ranks import local
from vexact.types import TrainSequence


def check_numbers(sequences: Sequence[TrainSequence]) -> None:
    """
    Raises:
        ValueError: an old log-probability, an advantage, a reference log-probability or a threshold is no number (a
            threshold may be -inf).
    """
    for name in ("logprobs", "min_logits", "advantages", "ref_logprobs", "recomputed_logprobs"):
        arrays = [_array(sequence, name) for sequence in sequences]
        packed = np.concatenate([array for array in arrays if array is not None] or [np.empty(0)])
        if _are_numbers(name, packed).all():
            continue
        for sequence, array in zip(sequences, arrays, strict=True):
            bad = np.flatnonzero(~_are_numbers(name, array)) if array is not None else np.empty(0, np.int64)
            if array is not None and len(bad):
                raise ValueError(
                    f"{sequence.sample.request_id}: {name}[{bad[0]}] is {array[bad[0]]}; only finite numbers reach an "
                    "optimizer step"
                )


def _array(sequence: TrainSequence, name: str) -> np.ndarray | None:
    values: np.ndarray | None = getattr(sequence.sample if name in ("logprobs", "min_logits") else sequence, name)
    return values


def _are_numbers(name: str, values: np.ndarray) -> np.ndarray:
    return values < np.inf if name == "min_logits" else np.isfinite(values)


def why_skipped(loss: float, model: nn.Module) -> str:
    """A clause on why an optimizer step was skipped, from its loss and the gradients that are still there."""
    found = find_nonfinite((name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None)
    if found is not None:
        return f"the loss was {loss:g}; of the gradients, {found}"
    return f"the loss was {loss:g}, every gradient finite, and their norm overflows float32"


def nonfinite_state(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """What of the weights and moments (of this rank) is not finite, a clause per tensor; empty when all is well.

    To be called after an optimizer step, which passes what is not finite in a first moment on to its weight: first
    moments are read only to name them. An infinite second moment would freeze its weight and leave it finite.
    """
    weights = (local(parameter) for parameter in model.parameters())
    if all_finite([*weights, *optimizer.second_moments()]):
        return []
    found = (find_nonfinite([(name, tensor)]) for name, tensor in _named_state(model, optimizer))
    return [clause for clause in found if clause is not None]


def _named_state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, local(parameter)
        if (moments := optimizer.state_of(parameter)) is not None:
            yield from ((f"{key} of {name}", getattr(moments, key)) for key in MOMENTS)
