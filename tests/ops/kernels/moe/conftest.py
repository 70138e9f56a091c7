"""What the interpreter has to be taught for kernels of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rowwise import DEVICE

from vexact.ops.cpu.fma import fma


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tl.fma`` rounds once, as it does on a GPU."""
    if DEVICE != "cpu":
        return
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        rounded = fma(*(torch.from_numpy(np.array(operand.data, np.float32)) for operand in (x, y, z)))
        return interpreter.TensorHandle(rounded.numpy(), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
