"""Rows that pad a captured decode step: one query without keys, in a batch that claims more keys than there are."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import DEVICE, SMALL, make_batch, make_pages, same_bits

from vexact.ops.kernels.attention import paged_forward


@pytest.mark.parametrize("page_size", [5, 16, 32])
def test_a_row_without_keys_reads_no_page_and_gives_zero(page_size: int) -> None:
    """The table row of such a sequence points far outside the cache, which reading would show as NaN or a crash."""
    batch = make_batch([1, 1, 1], [70, 9, 33], heads=(4, 2))
    pages = make_pages(batch, page_size)
    expected = pages.run(batch)
    padded = make_batch([1] * 5, [70, 9, 33, 0, 0], heads=(4, 2))
    padded.q[:3] = batch.q
    table = torch.full((5, pages.table.shape[1] + 3), -1, dtype=torch.int32, device=DEVICE)
    table[:3, : pages.table.shape[1]] = pages.table
    table[3:] = -(1 << 20)
    used = torch.tensor(padded.k_lens, dtype=torch.int32, device=DEVICE)
    for num_keys in (70, 96, 500):
        out, lse = paged_forward(
            padded.q, pages.k_cache, pages.v_cache, padded.cu_q, used, table, 1, num_keys, batch.scale, True,
            key_blocks=SMALL,
        )  # fmt: skip
        assert same_bits((out[:3], lse[:3]), expected)
        assert not out[3:].any()
        assert bool((lse[3:] == float("-inf")).all())
