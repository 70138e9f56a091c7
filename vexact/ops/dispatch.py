"""Chooses the implementation of an op from the device of its first tensor."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor


@cache
def _load(package: str, op: str) -> ModuleType:
    return import_module(f"vexact.ops.{package}.{op}")


def backend(op: str, tensor: Tensor) -> ModuleType:
    """The module implementing ``op`` for ``tensor``: Triton kernels on CUDA, the plain-torch twin on CPU.

    Raises:
        ValueError: the tensor lives on a device that has no implementation.
    """
    if tensor.device.type == "cuda":
        return _load("kernels", op)
    if tensor.device.type == "cpu":
        return _load("cpu", op)
    raise ValueError(f"{op}: no implementation for device {tensor.device}; move the tensors to cuda or cpu")
