"""SwiGLU kernels against fp64 and their CPU twin."""

from __future__ import annotations

import pytest
import torch
from rowwise import poisoned_outputs, randn, relative_error, same_bits

from vexact.ops.cpu import swiglu as twin
from vexact.ops.kernels import swiglu as kernel
from vexact.ops.swiglu import swiglu_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("width", [1, 73, 1536, 6144])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_matches_fp64_and_the_twin(width: int, dtype: torch.dtype) -> None:
    gate_up = randn(7, 2 * width, seed=width, dtype=dtype, scale=3.0)
    with poisoned_outputs():
        out = kernel.forward(gate_up)
    reference = swiglu_reference(gate_up)
    assert out.dtype == dtype
    assert relative_error(out, reference) < TOLERANCE[dtype]
    # One rounding: the error is close to the twin's, plus an fp32 rounding for another exponential.
    twin_error = relative_error(twin.forward(gate_up.cpu()), reference.cpu())
    assert relative_error(out, reference) <= 1.5 * twin_error + 2**-24


@pytest.mark.parametrize("width", [73, 6144])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_backward_matches_fp64(width: int, dtype: torch.dtype) -> None:
    gate_up = randn(5, 2 * width, seed=width, dtype=dtype, scale=3.0)
    dy = randn(5, width, seed=2, dtype=dtype)
    wide = gate_up.double().requires_grad_()
    swiglu_reference(wide).backward(dy.double())
    with poisoned_outputs():
        grad = kernel.backward(dy, gate_up)
    assert grad.dtype == dtype
    assert relative_error(grad, wide.grad) < TOLERANCE[dtype]


def test_extreme_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-200.0, -89.0, 0.0, 89.0, 200.0] + [1.0] * 5]).to(randn(1, seed=0).device)
    out = kernel.forward(gate_up)
    grad = kernel.backward(torch.ones_like(out), gate_up)
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
    assert torch.allclose(out.double(), swiglu_reference(gate_up), rtol=1e-6, atol=1e-30)


def test_a_row_does_not_depend_on_its_batch() -> None:
    gate_up = randn(9, 2 * 576, seed=1, dtype=torch.bfloat16)
    dy = randn(9, 576, seed=2, dtype=torch.bfloat16)
    out, grad = kernel.forward(gate_up), kernel.backward(dy, gate_up)
    for rows in (slice(0, 1), slice(4, 9)):
        assert same_bits(kernel.forward(gate_up[rows].contiguous()), out[rows])
        assert same_bits(kernel.backward(dy[rows].contiguous(), gate_up[rows].contiguous()), grad[rows])
