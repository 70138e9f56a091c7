"""NaN and infinity among a model's numbers: whether there are any, and where."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A NaN or an infinity where only a number has a meaning; the message says where, and the likely cause."""


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite. One pass, no copy, and one wait for the device."""
    extremes = [bound.double() for tensor in tensors if tensor.numel() for bound in tensor.detach().aminmax()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def find_nonfinite(named_tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Names the first tensor that is not finite, with its first such value; None when all are.

    >>> find_nonfinite([("a", torch.zeros(2)), ("b", torch.tensor([[1.0, float("nan")]]))])
    'b holds 1 non-finite number of 2, the first nan at [0, 1]'
    """
    for name, tensor in named_tensors:
        if all_finite([tensor]):
            continue
        tensor = tensor.detach()
        bad = (~tensor.isfinite()).nonzero()
        index = bad[0].tolist()
        plural = "s" if len(bad) > 1 else ""
        value = float(tensor[tuple(index)])
        return f"{name} holds {len(bad)} non-finite number{plural} of {tensor.numel()}, the first {value} at {index}"
    return None


def cause_of_nonfinite(named_weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """One sentence on why a model in ``dtype`` computes numbers that are not finite, from a scan of its weights."""
    found = find_nonfinite(named_weights)
    if found is not None:
        return found
    name = str(dtype).removeprefix("torch.")
    wider = "" if dtype == torch.float32 else "; try a wider dtype (float16 ends at 65504)"
    return f"Every weight is finite, so a number overflows inside the {name} forward pass{wider}"
