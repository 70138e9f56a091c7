"""Where the kernel tests run: on the GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    # The interpreter is chosen when a kernel module is imported, so this module comes first in every kernel test.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
    import interpreter_bf16

    interpreter_bf16.install()


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fresh tensors come filled with NaN (or the largest integer), so an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the test device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bits; distinguishes -0 from +0 and equates equal NaNs."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(words), right.contiguous().view(words))


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy of ``x`` whose first element is not 16-byte aligned."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = storage[1:].view(x.shape)
    view.copy_(x)
    return view


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference|| in fp64; NaN if the value has one."""
    difference = torch.linalg.vector_norm(value.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))
