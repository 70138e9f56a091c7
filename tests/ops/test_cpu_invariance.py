"""A row's bits do not depend on its company: every small shape, on this processor's paths and on those of others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cpu_sweep
import pytest
import torch

from vexact.ops import linear
from vexact.ops.cpu import product
from vexact.ops.cpu.linear import grad_input

_SCRIPT = Path(cpu_sweep.__file__)


@pytest.mark.parametrize("name", cpu_sweep.CHECKS)
def test_no_shape_differs_here(name: str) -> None:
    torch.manual_seed(0)
    assert cpu_sweep.CHECKS[name](False, torch.float32) == []


@pytest.mark.parametrize("instructions", ["AVX2", "SSE4_2"])
def test_no_shape_differs_on_the_code_paths_of_other_processors(instructions: str) -> None:
    """MKL takes the kernels of older processors when told to; without MKL this repeats the test above."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions, "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(_SCRIPT.parents[2])
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_sweep_finds_a_product_that_depends_on_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def split_by_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 40 and x.shape[1] > 20:
            return x[:, :8] @ weight[:8] + x[:, 8:] @ weight[8:]
        return x @ weight

    monkeypatch.setattr("vexact.ops.cpu.linear.product", split_by_rows)
    assert len(cpu_sweep.check_linear(False, torch.float32)) > 50
    monkeypatch.undo()
    monkeypatch.setattr("vexact.ops.cpu.moe.grouped_linear.product", split_by_rows)
    assert {(33, 7), (64, 96)} & set(cpu_sweep.check_moe(False, torch.float32))


@pytest.mark.parametrize("step", [*range(1, 20), 24, 32, 40, 64])
def test_tiles_of_attention_have_rows_that_every_kernel_computes_alike(step: int) -> None:
    rows = product.even_rows(step)
    assert rows % step == 0
    assert rows >= 4 * step
    assert rows % 12 in (0, 4)


@pytest.mark.parametrize(
    ("rows", "inner", "width"), [(1, 1, 1), (24, 3, 17), (25, 40, 1040), (97, 7, 2065), (5, 24, 3000)]
)
def test_padding_and_panels_do_not_change_the_value(rows: int, inner: int, width: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inner), torch.randn(inner, width)
    torch.testing.assert_close(product.product(x, weight).double(), x.double() @ weight.double(), rtol=1e-5, atol=1e-5)
    assert product.product(x[:0], weight).shape == (0, width)


def test_few_rows_on_many_threads_are_those_of_one_thread() -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(60, 1100), torch.randn(2100, 1100), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            results.append([linear(x, weight), linear(x[:1], weight), grad_input(linear(x[:3], weight), weight)])
            assert torch.get_num_threads() == threads  # as it was, after products on one thread
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0][0][:1], results[0][1])
