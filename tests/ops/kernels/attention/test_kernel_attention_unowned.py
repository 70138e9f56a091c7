"""Rows past the last sequence are zero in outputs and gradients, whatever was in their memory before."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import DEVICE, SMALL, Batch, cumulative, make_batch, make_pages, same_bits

from vexact.ops.kernels.attention import packed_backward, packed_forward, paged_forward
from vexact.ops.kernels.attention.launch import Tile

TILE = Tile(16, 4, 1, 16)


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold 7e7 until they are written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(7e4))


def with_extra_rows(batch: Batch, extra_q: int, extra_k: int) -> Batch:
    """The same sequences, followed by rows of NaN that belong to none."""
    grown = make_batch([*batch.q_lens, extra_q], [*batch.k_lens, extra_k], heads=(4, 2), dims=(24, 20))
    for rows, own in ((grown.q, batch.q), (grown.k, batch.k), (grown.v, batch.v)):
        rows[: len(own)] = own
        rows[len(own) :] = float("nan")
    return Batch(grown.q, grown.k, grown.v, batch.q_lens, batch.k_lens)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize(("extra_q", "extra_k"), [(0, 5), (1, 0), (37, 20)])
@pytest.mark.parametrize("lengths", [[9, 0, 10], [16], []])
def test_packed_rows_and_gradients(lengths: list[int], extra_q: int, extra_k: int) -> None:
    own = make_batch(lengths, lengths, heads=(4, 2), dims=(24, 20))
    batch, owned = with_extra_rows(own, extra_q, extra_k), sum(lengths)
    ends, longest = cumulative(lengths), max(lengths, default=0)
    given = ends, ends, longest, longest, 0.2, True
    out, lse = packed_forward(batch.q, batch.k, batch.v, *given, tile=TILE, key_blocks=SMALL)
    assert not out[owned:].any()
    assert bool((lse[owned:] == float("-inf")).all())
    tiles = {"keys_tile": TILE, "queries_tile": TILE}
    grads = packed_backward(torch.ones_like(out), batch.q, batch.k, batch.v, out, lse, *given, **tiles)
    for grad in grads:
        assert not grad[owned:].any()
    if owned:
        expected = packed_forward(own.q, own.k, own.v, *given, tile=TILE, key_blocks=SMALL)
        assert same_bits((out[:owned], lse[:owned]), expected)
        gradients = packed_backward(torch.ones_like(expected[0]), own.q, own.k, own.v, *expected, *given, **tiles)
        assert same_bits(tuple(grad[:owned] for grad in grads), gradients)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("split_rows", [0, 1, 3, None])
@pytest.mark.parametrize("extra", [1, 21])
def test_paged_rows(split_rows: int | None, extra: int) -> None:
    """Decode in chunks, prefill in tiles, and both in one batch."""
    own = make_batch([1, 3, 1], [70, 9, 33], heads=(4, 2), dims=(24, 20))
    pages, batch = make_pages(own, 16), with_extra_rows(own, extra, 0)
    used = torch.tensor(own.k_lens, dtype=torch.int32, device=DEVICE)
    out, lse = paged_forward(
        batch.q, pages.k_cache, pages.v_cache, own.cu_q, used, pages.table, 3, 70, own.scale, True,
        split_rows=split_rows, tile=TILE, key_blocks=SMALL,
    )  # fmt: skip
    assert not out[5:].any()
    assert bool((lse[5:] == float("-inf")).all())
    assert same_bits((out[:5], lse[:5]), pages.run(own))
