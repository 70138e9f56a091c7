"""What operators refuse, in the same words on every device."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether both are on one device and of one dtype that operators take. If not, :func:`check_floats` says why."""
    return x.dtype == y.dtype and x.device == y.device and x.dtype in FLOATS


def check_floats(op: str, **tensors: Tensor) -> None:
    """
    Raises:
        ValueError: a tensor is not fp32, bf16 or fp16, or has another dtype or device than the first one.
    """
    first_name, first = next(iter(tensors.items()))
    if first.dtype not in FLOATS:
        raise ValueError(f"{op}: {first_name} is {first.dtype}; use fp32, bf16 or fp16")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{op}: {first_name} is {first.dtype} but {name} is {tensor.dtype}; cast one of them")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {first_name} is on {first.device} but {name} is on {tensor.device}")


def check_dims(op: str, dims: int, meaning: str, **tensors: Tensor) -> None:
    """
    Args:
        meaning: the axes, as in ``(T, heads, D)``.

    Raises:
        ValueError: a tensor has not ``dims`` axes.
    """
    for name, tensor in tensors.items():
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {meaning}")


def check_per_row(op: str, rows: int, dtype: torch.dtype, **tensors: Tensor) -> None:
    """
    Raises:
        ValueError: a tensor is not (``rows``,) of ``dtype``.
    """
    for name, tensor in tensors.items():
        if tensor.shape != (rows,):
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected ({rows},)")
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {dtype}")


def out_of_range(op: str, name: str, ids: Tensor, limit: int) -> ValueError:
    """The error for ids on the CPU of which one is not in [0, ``limit``)."""
    wrong = ids[(ids < 0) | (ids >= limit)]
    return ValueError(f"{op}: {name} holds {int(wrong[0])}, which is outside 0 ... {limit - 1}")
