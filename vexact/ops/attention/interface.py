"""The one attention call models make."""

from __future__ import annotations

from torch import Tensor

from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata
from vexact.ops.attention.packed import packed_attention
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
        ValueError: paged metadata without a cache.
    """
    if isinstance(metadata, PackedMetadata):
        cu, longest = metadata.cu_seqlens, metadata.max_seqlen
        return packed_attention(q, k, v, cu, cu, longest, longest, softmax_scale, causal)[0]
    if kv_cache is None:
        raise ValueError("attention: paged metadata needs kv_cache=(k_cache, v_cache)")
    write_kv(k, v, kv_cache, metadata.slot_mapping)
    return backend("attention", q).paged_forward(
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


def write_kv(k: Tensor, v: Tensor, kv_cache: KVCache, slot_mapping: Tensor) -> None:
    """Scatters keys and values (T, Hkv, D) into the pages; a negative slot is skipped. Views are read in place."""
    backend("attention", k).write_kv(k, v, *kv_cache, slot_mapping)
