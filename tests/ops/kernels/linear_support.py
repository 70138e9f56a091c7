"""What the tests of the matrix products share: the device, a model of the tensor core, exact references."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from rowwise import DEVICE, randn
from torch import Tensor

__all__ = ["DEVICE", "at_once", "integers", "randn", "sequential_product", "tensor_core"]

CORE_DEPTH = 16  # products that one tensor core instruction adds before it rounds


def sequential_product(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start + a @ b as a model of the tensor core: K in order, CORE_DEPTH products at a time, one fp32 rounding each.

    The products of bf16 and fp16 values and sums of 16 of them are exact in fp64, so the order inside does not matter.
    """
    for k in range(0, a.shape[1], CORE_DEPTH):
        part = a[:, k : k + CORE_DEPTH].astype(np.float64) @ b[k : k + CORE_DEPTH].astype(np.float64)
        start = (start.astype(np.float64) + part).astype(np.float32)
    return start


def at_once(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (N, K)ᵀ by ``sequential_product``, fp32."""
    start = np.zeros((a.shape[0], b.shape[0]), np.float32)
    out = torch.from_numpy(sequential_product(a.float().cpu().numpy(), b.float().cpu().numpy().T, start))
    return (out if bias is None else out + bias.float().cpu()).to(a.device)


def integers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Small integers, whose sums of products are exact in fp32 in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def tensor_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teach the interpreter what the GPU does: the order inside a dot product, and additions through a descriptor."""
    if DEVICE != "cpu":
        return
    import interpreter_bf16
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle

    def widened(operand: Any) -> np.ndarray:
        is_bf16 = operand.dtype.scalar.name == "bf16"
        return interpreter_bf16.bf16_bits_to_float(operand.data) if is_bf16 else operand.data

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        return handle(sequential_product(widened(a), widened(b), acc.data), acc.dtype.scalar)

    def create_descriptor_reduce(self: Any, kind: Any, desc: Any, value: Any, indices: Any) -> None:
        assert "ADD" in str(kind)
        hints = len(signature(self.create_descriptor_load).parameters) - 2  # caching hints; they differ by release
        old = self.create_descriptor_load(desc, indices, *[None] * hints)
        self.create_descriptor_store(desc, handle(old.data + value.data, value.dtype), indices)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_descriptor_reduce", create_descriptor_reduce, raising=False
    )
