"""The check in conftest.py sees what it is there for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(target + places, tl.load(source + places, mask=places < count, other=0.0), mask=places < BLOCK - 1)


def test_an_access_past_the_end_of_an_argument_is_an_error() -> None:
    whole = torch.zeros(64)
    copy_kernel[(1,)](whole[:5], whole[32:39], 5, BLOCK=8)
    with pytest.raises(InterpreterError, match=r"copy_kernel: .* at byte 20 of an argument of 20"):
        copy_kernel[(1,)](whole[:5], whole[32:39], 6, BLOCK=8)  # reads one element too many
    with pytest.raises(InterpreterError, match=r"copy_kernel: .* at byte 24 of an argument of 24"):
        copy_kernel[(1,)](whole[:5], whole[32:38], 5, BLOCK=8)  # writes one
