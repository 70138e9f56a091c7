"""The cache write: every row where its slot says, nothing anywhere else."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import DEVICE, make_batch, same_bits

from vexact.ops.kernels.attention import write_kv


@pytest.mark.parametrize(("page_size", "dims"), [(16, (32, 32)), (5, (40, 24)), (16, (192, 128))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_land_in_their_slots(page_size: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    rows = make_batch([0], [37], heads=(3, 3), dims=dims, dtype=dtype)
    num_pages = 12
    slots = torch.randperm(num_pages * page_size, generator=torch.Generator().manual_seed(0))[:37].to(DEVICE)
    slots[::5] = -1
    caches, expected = [], []
    for source in (rows.k, rows.v):
        # A layer's cache is a strided view of a larger allocation.
        cache = torch.full((num_pages, 2, page_size, 3, source.shape[-1]), 7.0, dtype=dtype, device=DEVICE)[:, 1]
        wanted = cache.clone()
        kept = slots >= 0
        wanted[slots[kept] // page_size, slots[kept] % page_size] = source[kept]
        caches.append(cache)
        expected.append(wanted)
    write_kv(rows.k, rows.v, *caches, slots)
    assert same_bits(tuple(cache.contiguous() for cache in caches), tuple(expected))


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    rows = make_batch([0], [9], heads=(2, 2))
    fused = torch.cat([rows.k, rows.v], dim=1)
    caches = [torch.zeros(3, 4, 2, 32, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    write_kv(fused[:, :2], fused[:, 2:], *caches, torch.arange(9, device=DEVICE))
    assert same_bits(tuple(cache.flatten(0, 1)[:9] for cache in caches), (rows.k, rows.v))


def test_a_cache_of_another_dtype_is_refused() -> None:
    rows = make_batch([0], [1])
    cache = torch.zeros(1, 16, 1, 32, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"write_kv: k is torch.bfloat16"):
        write_kv(rows.k, rows.v, cache, cache, torch.zeros(1, dtype=torch.int64, device=DEVICE))
