"""Attention backward kernels: gradients against fp64, the same bits on every run and in every batch."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import Batch, cumulative, make_batch, relative_error, same_bits
from torch import Tensor

from vexact.ops.attention.reference import attention_reference
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.launch import Tile

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
TILES = {"keys_tile": Tile(16, 4, 1, 32), "queries_tile": Tile(32, 4, 1, 16)}


def gradients(batch: Batch, dout: Tensor, causal: bool, **tiles: Tile) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = packed_forward(*batch.arguments, causal)
    q, k, v, *rest = batch.arguments
    return packed_backward(dout, q, k, v, out, lse, *rest, causal, **tiles)


def reference_gradients(batch: Batch, dout: Tensor, causal: bool) -> tuple[Tensor, ...]:
    leaves = [tensor.double().requires_grad_() for tensor in (batch.q, batch.k, batch.v)]
    out, _ = attention_reference(*leaves, batch.cu_q, batch.cu_k, batch.scale, causal)
    return torch.autograd.grad(out, leaves, dout.double())


def output_gradient(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (*batch.q.shape[:2], batch.v.shape[-1])
    return torch.randn(*shape, generator=generator).to(batch.q.dtype).to(batch.q.device)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "heads", "dims"),
    [
        (torch.float32, (4, 2), (40, 24)),
        (torch.bfloat16, (3, 1), (32, 32)),
        (torch.float16, (1, 1), (96, 80)),
    ],
)
def test_gradients_match_fp64(dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], causal: bool) -> None:
    batch = make_batch([40, 1, 0, 21, 5], [40, 35, 3, 9, 0], heads=heads, dims=dims, dtype=dtype)
    dout = output_gradient(batch)
    for got, expected in zip(gradients(batch, dout, causal), reference_gradients(batch, dout, causal), strict=True):
        assert relative_error(got, expected) < TOLERANCE[dtype]


def test_small_blocks_cross_the_diagonal() -> None:
    batch = make_batch([50, 20], [50, 37], dtype=torch.float32)
    dout = output_gradient(batch)
    for got, expected in zip(
        gradients(batch, dout, True, **TILES), reference_gradients(batch, dout, True), strict=True
    ):
        assert relative_error(got, expected) < TOLERANCE[torch.float32]


def test_rows_that_see_no_key_and_keys_that_no_row_sees_get_zero() -> None:
    batch = make_batch([9, 0], [4, 3], dtype=torch.float32)
    dq, dk, dv = gradients(batch, output_gradient(batch), True)
    assert not dq[:5].any()
    assert dq[6:].any(-1).all()
    assert not dk[4:].any()
    assert not dv[4:].any()


def test_bits_repeat_and_do_not_depend_on_batch_mates() -> None:
    batch = make_batch([40, 3, 18], [40, 3, 18])
    dout = output_gradient(batch)
    together = gradients(batch, dout, True, **TILES)
    assert same_bits(together, gradients(batch, dout, True, **TILES))
    bounds = cumulative(batch.q_lens).tolist()
    for index in range(3):
        low, high = bounds[index], bounds[index + 1]
        alone = gradients(batch.sequence(index), dout[low:high], True, **TILES)
        assert same_bits(tuple(part[low:high] for part in together), alone)
