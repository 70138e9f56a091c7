"""Chooses the implementation of an op from the device of its first tensor, or its opaque form for a compiler."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@cache
def _load(package: str, op: str) -> ModuleType:
    return import_module(f"vexact.ops.{package}.{op}")


def backend(op: str, tensor: Tensor) -> Any:
    """The functions that launch ``op`` on ``tensor``: those of :func:`module`, or while ``torch.compile`` or
    ``torch.export`` captures a graph, the custom operators that stand for them.

    Raises:
        ValueError: no implementation for the device, or not one that can be captured.
    """
    if not torch.compiler.is_compiling():
        return module(op, tensor)
    from vexact.ops import library

    if op not in library.OPS:
        raise ValueError(f"{op} cannot be part of a compiled graph; call it outside of torch.compile")
    return library.OPS[op]


def module(op: str, tensor: Tensor) -> ModuleType:
    """The module implementing ``op`` for ``tensor``: Triton kernels on CUDA, the plain-torch twin on CPU.

    Raises:
        ValueError: the tensor lives on a device that has no implementation.
    """
    if tensor.is_cuda:
        return _load("kernels", op)
    if tensor.is_cpu:
        return _load("cpu", op)
    raise ValueError(f"{op}: no implementation for device {tensor.device}; move the tensors to cuda or cpu")
