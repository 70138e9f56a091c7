"""The one attention call models make."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.attention.checks import check_pages, readable
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata
from vexact.ops.attention.packed import packed_attention
from vexact.ops.checks import check_per_row
from vexact.ops.dispatch import backend

KVCache = tuple[Tensor, Tensor]  # keys (num_pages, page_size, Hkv, D), values (num_pages, page_size, Hkv, Dv)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention of the new tokens: over themselves (packed) or over the pages they were just written to (paged).

    Args:
        q: (T, Hq, D). k, v: (T, Hkv, D); with paged metadata they are first written to ``kv_cache``.

    Returns:
        (T, Hq, Dv). A token's bits are the same on both paths.

    Raises:
        ValueError: paged metadata without a cache, or tensors that do not fit each other, the metadata or the cache.
    """
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"attention: {q.shape[0]} queries, {k.shape[0]} keys, {v.shape[0]} values; they must be as many"
        )
    if isinstance(metadata, PackedMetadata):
        if readable(metadata.cu_seqlens) and int(metadata.cu_seqlens[-1]) > q.shape[0]:
            raise ValueError(f"cu_seqlens ends with {int(metadata.cu_seqlens[-1])}, but q has {q.shape[0]} rows")
        cu, longest = metadata.cu_seqlens, metadata.max_seqlen
        return packed_attention(q, k, v, cu, cu, longest, longest, softmax_scale, causal)[0]
    if kv_cache is None:
        raise ValueError("attention: paged metadata needs kv_cache=(k_cache, v_cache)")
    check_per_row("attention", q.shape[0], torch.int64, slot_mapping=metadata.slot_mapping)
    write_kv(k, v, kv_cache, metadata.slot_mapping)
    return cached_attention(q, metadata, softmax_scale, kv_cache, causal)


def cached_attention(
    q: Tensor, metadata: PagedMetadata, softmax_scale: float, kv_cache: KVCache, causal: bool = True
) -> Tensor:
    """:func:`attention` of queries (T, Hq, D) whose keys and values have been written -> (T, Hq, Dv)."""
    out: Tensor = backend("attention", q).paged_forward(
        q,
        *kv_cache,
        metadata.cu_seqlens_q,
        metadata.seqused_k,
        metadata.block_table,
        metadata.max_seqlen_q,
        metadata.max_seqlen_k,
        softmax_scale,
        causal,
    )[0]
    return out


def write_kv(k: Tensor, v: Tensor, kv_cache: KVCache, slot_mapping: Tensor) -> None:
    """Scatters keys and values (T, Hkv, D) into the pages; a negative slot is skipped. Views are read in place.

    Raises:
        ValueError: heads, widths or dtypes are not those of the cache.
    """
    check_pages("write_kv", k, v, kv_cache)
    backend("attention", k).write_kv(k, v, *kv_cache, slot_mapping)
