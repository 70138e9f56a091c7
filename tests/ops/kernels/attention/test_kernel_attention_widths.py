"""Keys and values of different widths, as in latent attention: 192 columns of keys are a tile of 128 and one of 64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attention_inputs import DEVICE, SMALL, Batch, Pages, cumulative, make_batch, make_pages, relative_error, same_bits
from torch import Tensor

from vexact.ops.attention.reference import attention_reference
from vexact.ops.cpu import attention as twin
from vexact.ops.kernels.attention import packed_backward, packed_forward
from vexact.ops.kernels.attention.descriptors import row_descriptors
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, HeadShape, Tile, key_columns
from vexact.ops.kernels.launches import forget

LATENT = (192, 128)  # of DeepSeek-V3 and Moonlight
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CASES = [
    (LATENT, torch.bfloat16, (2, 2)),
    (LATENT, torch.float32, (1, 1)),
    ((136, 100), torch.float16, (2, 1)),  # tiles of which neither is full
    ((24, 16), torch.bfloat16, (4, 4)),
    ((24, 16), torch.float32, (4, 2)),
    ((16, 40), torch.bfloat16, (2, 2)),  # values wider than keys
]


def gradients(batch: Batch, causal: bool = True) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) with a fixed gradient of the output."""
    q, k, v, *rest = batch.arguments
    out, lse = packed_forward(*batch.arguments, causal)
    dout = torch.randn(batch.q.shape[0], *out.shape[1:], generator=torch.Generator().manual_seed(1)).to(out)
    return out, lse, *packed_backward(dout, q, k, v, out, lse, *rest, causal)


@pytest.mark.parametrize(
    ("dims", "columns", "key"),
    [
        (LATENT, (128, 64), 192),
        ((136, 100), (128, 16), 192),
        ((192, 192), (256, 0), 256),
        ((200, 128), (256, 0), 256),
        ((128, 128), (128, 0), 128),
        ((24, 16), (32, 0), 32),
    ],
)
def test_keys_of_129_to_192_columns_come_in_two_tiles(
    dims: tuple[int, int], columns: tuple[int, int], key: int
) -> None:
    assert key_columns(*dims) == columns
    shape = HeadShape(16, 16, *dims, 2)
    assert (shape.dim_pad, shape.key) == (columns[0], (2, key))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dims", "dtype", "heads"), CASES)
def test_forward_and_gradients_match_fp64(
    dims: tuple[int, int], dtype: torch.dtype, heads: tuple[int, int], causal: bool
) -> None:
    batch = make_batch([21, 1, 0, 5], [21, 35, 3, 2], heads=heads, dims=dims, dtype=dtype)
    out, lse, *grads = gradients(batch, causal)
    leaves = [tensor.double().requires_grad_() for tensor in (batch.q, batch.k, batch.v)]
    expected, expected_lse = attention_reference(*leaves, batch.cu_q, batch.cu_k, batch.scale, causal)
    assert relative_error(out, expected.detach()) < TOLERANCE[dtype]
    seeing = expected_lse > float("-inf")
    assert torch.allclose(lse[seeing].double(), expected_lse[seeing], atol=TOLERANCE[dtype], rtol=0)
    dout = torch.randn(batch.q.shape[0], *out.shape[1:], generator=torch.Generator().manual_seed(1)).to(out)
    for got, wanted in zip(grads, torch.autograd.grad(expected, leaves, dout.double()), strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dims", [LATENT, (24, 16)])
def test_matches_the_cpu_twin(dims: tuple[int, int]) -> None:
    batch = make_batch([33, 7], [33, 7], heads=(2, 2), dims=dims, dtype=torch.float32)
    got = packed_forward(*batch.arguments, True)
    on_cpu = (argument.cpu() if isinstance(argument, Tensor) else argument for argument in batch.arguments)
    for one, other in zip(got, twin.packed_forward(*on_cpu, True), strict=True):
        assert relative_error(one.cpu(), other) < 1e-6


@pytest.mark.parametrize(
    ("dims", "dtype"), [(LATENT, torch.bfloat16), ((24, 16), torch.bfloat16), (LATENT, torch.float32)]
)
@pytest.mark.parametrize("page_size", [5, 16])
def test_pages_and_decode_give_the_bits_of_packed_rows(
    dims: tuple[int, int], dtype: torch.dtype, page_size: int
) -> None:
    lengths = [37, 1, 18]
    batch = make_batch(lengths, lengths, heads=(2, 2), dims=dims, dtype=dtype)
    pages = make_pages(batch, page_size)
    expected = packed_forward(*batch.arguments, True, tile=Tile(64, 4, 1), key_blocks=SMALL)
    for split_rows in (0, 1):
        assert same_bits(expected, pages.run(batch, split_rows=split_rows, tile=Tile(32, 4, 1)))
    positions = [0, 15, 16, 31, 32, 36]  # of the first sequence, decoded side by side
    steps = Batch(batch.q[positions], batch.k, batch.v, [1] * len(positions), [p + 1 for p in positions])
    alone = Pages(pages.k_cache, pages.v_cache, pages.table[:1].expand(len(positions), -1).contiguous())
    assert same_bits(tuple(rows[positions] for rows in expected), alone.run(steps))


@pytest.mark.parametrize("dims", [LATENT, (24, 16)])
def test_bits_repeat_and_do_not_depend_on_batch_mates(dims: tuple[int, int]) -> None:
    batch = make_batch([20, 3, 35], [20, 3, 35], heads=(2, 2), dims=dims)
    out, lse, *grads = gradients(batch)
    assert same_bits((out, lse, *grads), gradients(batch))
    dout = torch.randn(batch.q.shape[0], *out.shape[1:], generator=torch.Generator().manual_seed(1)).to(out)
    for index, (low, high) in enumerate(pairwise(cumulative(batch.q_lens).tolist())):
        own = batch.sequence(index)
        assert same_bits(tuple(rows[low:high] for rows in (out, lse)), packed_forward(*own.arguments, True))
        q, k, v, *rest = own.arguments
        alone = packed_backward(dout[low:high], q, k, v, out[low:high], lse[low:high], *rest, True)
        assert same_bits(tuple(rows[low:high] for rows in grads), alone)


def test_rows_past_the_sequences_are_zero_in_both_tiles() -> None:
    batch = make_batch([9], [9], dims=LATENT)
    lengths = cumulative([4])
    out, lse = packed_forward(batch.q, batch.k, batch.v, lengths, lengths, 4, 4, batch.scale, True)
    poisoned = [torch.full_like(rows, float("nan")) for rows in (batch.q, batch.k, batch.v)]
    for whole, rows in zip(poisoned, (batch.q, batch.k, batch.v), strict=True):
        whole[:4] = rows[:4]
    dout = torch.ones_like(out)
    for gradient in packed_backward(dout, *poisoned, out, lse, lengths, lengths, 4, 4, batch.scale, True):
        assert gradient[1:4].abs().amax(-1).gt(0).all()  # the first query has no choice, hence no gradient
        assert not gradient[4:].any()


def test_descriptors_load_both_tiles_and_values_that_are_part_of_a_wider_row(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([5], [54], heads=(2, 2), dims=LATENT)  # whole blocks that every row sees, and a ragged end
    nan = torch.full((54, 2, 128), float("nan"), dtype=batch.v.dtype, device=DEVICE)
    batch.v = torch.cat([nan, batch.v], dim=-1)[..., 128:]  # as values lie behind the keys of one projection
    pages = make_pages(batch, 16)

    def results() -> list[tuple[Tensor, Tensor]]:
        whole = packed_forward(*batch.arguments, True, key_blocks=SMALL)
        return [whole, pages.run(batch), pages.run(batch, split_rows=64)]

    described = row_descriptors(batch.k, batch.v, SMALL.block_n)
    assert described is not None
    assert [part.block_shape for part in described if part] == [[16, 128], [16, 64], [16, 128]]
    assert row_descriptors(pages.k_cache, pages.v_cache, SMALL.block_n) is not None
    got = results()
    for module in ("packed", "paged"):
        monkeypatch.setattr(f"vexact.ops.kernels.attention.{module}.row_descriptors", lambda *_: None)
    forget()
    for one, other in zip(got, results(), strict=True):
        assert same_bits(one, other)


@pytest.mark.gpu
def test_two_tiles_give_the_bits_of_one_padded_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([300, 1, 65], [300, 2100, 65], heads=(16, 16), dims=LATENT)
    blocks, tile = KEY_BLOCKS[2, 192], Tile(64, 4, 1)
    expected = packed_forward(*batch.arguments, True, tile=tile, key_blocks=blocks)
    for module in ("launch", "descriptors"):
        monkeypatch.setattr(f"vexact.ops.kernels.attention.{module}.key_columns", lambda dim, value_dim: (256, 0))
    forget()
    assert same_bits(expected, packed_forward(*batch.arguments, True, tile=tile, key_blocks=blocks))
