"""Whether weights are numbers that the compute type can hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """True if no value is infinite or NaN.

    One pass without a temporary: a sum that is finite has finite terms. Only where finite terms overflow the sum, or
    something is wrong, is every value looked at.
    """
    if bool(torch.isfinite(values.sum())):
        return True
    return bool(torch.isfinite(values).all())


def refuse_values(stored: Tensor, dtype: torch.dtype, name: str, file: Path) -> None:
    """
    Args:
        stored: the tensor as the file holds it.
        dtype: what it is to be computed in.

    Raises:
        ValueError: it holds values that are not finite, or that ``dtype`` makes infinite: how many, and the first.
    """
    bad = ~torch.isfinite(stored)
    if bad.any():
        raise ValueError(
            f"{file}: {name} has {_count(bad)} that are not finite ({_first(stored, bad)}); "
            "the checkpoint is damaged or diverged while it was trained, use an earlier one"
        )
    overflow = ~torch.isfinite(stored.to(dtype))
    if overflow.any():
        other = "bfloat16 or float32" if dtype == torch.float16 else "float32"
        raise ValueError(
            f"{file}: {name} has {_count(overflow)} beyond {str(dtype).removeprefix('torch.')}, which ends at "
            f"{torch.finfo(dtype).max:.5g} ({_first(stored, overflow)}); use dtype {other}"
        )


def _count(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()} values"


def _first(stored: Tensor, bad: Tensor) -> str:
    index = tuple(int(i) for i in bad.nonzero()[0])
    return f"the first: {float(stored[index]):.5g} at {list(index)}"
