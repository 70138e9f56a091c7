"""What the tests of the warp-specialised kernels share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from attention_inputs import Batch
from torch import Tensor

from vexact.ops.kernels.attention.launch import GLUON_RELEASES, triton_release

LATENT, WIDE = (192, 128), (256, 256)  # head dimensions

EDGES = [300, 64, 1, 0, 65, 127]
LENGTHS = {
    "tile edges": (EDGES, EDGES),
    "chunk edges": ([2049, 130],) * 2,
    "more keys": ([300, 64, 1, 5], [400, 100, 2300, 5]),
    "fewer keys": ([300, 64, 5, 130], [200, 10, 0, 128]),
}


def on_hopper() -> bool:
    there = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return there and triton_release() in GLUON_RELEASES


def compiles(test: Callable) -> Callable:
    """Marks a test that compiles the kernels for sm_90, with or without a GPU."""
    return pytest.mark.skipif(triton_release() not in GLUON_RELEASES, reason="another Gluon than theirs")(test)


def on_a_hopper(test: Callable) -> Callable:
    """Marks a test of real kernels. It takes no fixtures: see `compiled_in_parallel`."""
    there = pytest.mark.skipif(not on_hopper(), reason="these kernels are for sm_90 and for the Gluon of some releases")
    return pytest.mark.gpu(there(pytest.mark.usefixtures("compiled_in_parallel")(test)))


def with_nan_behind(rows: Tensor, count: int = 200) -> Tensor:
    return torch.cat([rows, torch.full_like(rows[:1], float("nan")).expand(count, *rows.shape[1:])])


def shorter(batch: Batch) -> Batch:
    """The batch with rows of no sequence behind it, all of them NaN."""
    q, k, v = (with_nan_behind(rows) for rows in (batch.q, batch.k, batch.v))
    return Batch(q, k, v, batch.q_lens, batch.k_lens)


def run_test(module: str, name: str, parameters: dict[str, Any]) -> None:
    """In another process."""
    getattr(import_module(module), name)(**parameters)
