"""FlashAttention-2 that reads the pages of the cache in place, as others decode: what a CUDA graph can hold.

The package ``flash_attn`` splits the keys of a long sequence among programs; ``varlen_attn`` of torch must not
(``num_splits=1``), since with paged keys its split writes wrong rows (pytorch/pytorch#194167).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.ops.attention.checks import check_scale
from vexact.ops.attention.interface import KVCache, write_kv
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata
from vexact.ops.stock import dense
from vexact.ops.stock.flash import check_tensors, flash_attention_2

PAGE_MULTIPLE = 256
_NAME = "flash_attention_2"
_TOLERANCE = 0.02  # of the norm, in half precision
# (q, k_pages, v_pages, metadata, softmax_scale, causal) -> out
Reader = Callable[[Tensor, Tensor, Tensor, PagedMetadata, float, bool], Tensor]


def paged_flash_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None = None,
    causal: bool = True,
) -> Tensor:
    """``flash_attention_2`` that gathers nothing and waits for nothing.

    Raises:
        ValueError: tensors or pages that it does not take, or it is not installed.
    """
    if isinstance(metadata, PackedMetadata):
        return flash_attention_2(q, k, v, metadata, softmax_scale, kv_cache, causal)
    check_tensors(_NAME, q, k, v)
    check_scale(softmax_scale)
    if kv_cache is None:
        raise ValueError(f"{_NAME}: paged metadata needs kv_cache=(k_cache, v_cache)")
    page_size = kv_cache[0].shape[1]
    if page_size % PAGE_MULTIPLE:
        raise ValueError(f"{_NAME} reads pages of a multiple of {PAGE_MULTIPLE} tokens; page_size is {page_size}")
    write_kv(k, v, kv_cache, metadata.slot_mapping)
    return reader()(q, *kv_cache, metadata, softmax_scale, causal)


@functools.cache
def reader() -> Reader:
    """What is installed. Raises ValueError if nothing is."""
    try:
        package = import_module("flash_attn.flash_attn_interface")
    except ImportError:
        package = None
    if package is not None:
        return adapt_package(package.flash_attn_with_kvcache, package.flash_attn_varlen_func)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise ValueError(f"torch {torch.__version__} has no paged attention; install the package flash_attn") from None
    return adapt_torch(varlen_attn)


def adapt_package(decode: Callable[..., Any], varlen: Callable[..., Any]) -> Reader:
    """``flash_attn_with_kvcache`` where every sequence has one query, else ``flash_attn_varlen_func``."""

    def read(q: Tensor, k: Tensor, v: Tensor, metadata: PagedMetadata, scale: float, causal: bool) -> Tensor:
        used, table = metadata.seqused_k, metadata.block_table
        out: Tensor
        if metadata.max_seqlen_q == 1:
            out = decode(
                q.unsqueeze(1), k, v, cache_seqlens=used, block_table=table, softmax_scale=scale, causal=causal
            )
            return out.squeeze(1)
        ends = F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))
        longest = metadata.max_seqlen_q, metadata.max_seqlen_k
        out = varlen(
            q, k, v, metadata.cu_seqlens_q, ends, *longest, softmax_scale=scale, causal=causal, block_table=table
        )
        return out

    return read


def adapt_torch(varlen: Callable[..., Any]) -> Reader:
    """``varlen_attn`` with block tables."""

    def read(q: Tensor, k: Tensor, v: Tensor, metadata: PagedMetadata, scale: float, causal: bool) -> Tensor:
        ends = metadata.cu_seqlens_q
        out: Tensor = varlen(
            q,
            k,
            v,
            ends,
            ends,  # of the keys it needs some, but takes their number from seqused_k
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            scale=scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=q.shape[1] != k.shape[2],
            seqused_k=metadata.seqused_k,
            block_table=metadata.block_table,
            num_splits=1,
        )
        return out

    return read


def fault(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why paged FlashAttention cannot be used on this device; empty if it gives what ``stock.attention`` gives.

    Looked at on the device itself, since what a version takes depends on the GPU, and some give wrong rows.
    """
    generator = torch.Generator(device).manual_seed(0)
    for queries, keys in (([1, 1, 1, 1], [1, 700, 256, 0]), ([3, 1, 40], [3, 513, 300])):
        metadata = _metadata(queries, keys, device)
        num_pages = int(metadata.block_table.max()) + 1
        rows = [(sum(queries), heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)]
        pages = (num_pages, PAGE_MULTIPLE, num_kv_heads, head_dim)
        q, k, v, *cache = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for shape in (*rows, pages, pages)
        )
        try:
            ours = paged_flash_attention_2(q, k, v, metadata, head_dim**-0.5, (cache[0], cache[1]))
            ours = ours.float()
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            return f"paged FlashAttention fails here: {str(error).splitlines()[0]:.120}"
        k_cache, v_cache = (pages.float() for pages in cache)
        theirs = dense.attention(q.float(), k.float(), v.float(), metadata, head_dim**-0.5, (k_cache, v_cache))
        read = torch.repeat_interleave(metadata.seqused_k > 0, torch.tensor(queries, device=device))
        distance = (ours - theirs)[read].norm() / theirs[read].norm()
        if not bool(distance < _TOLERANCE):
            return f"paged FlashAttention gives wrong numbers here, off by {float(distance):.2g}"
    return ""


def _metadata(queries: list[int], keys: list[int], device: torch.device) -> PagedMetadata:
    """Sequences whose last tokens are new, in pages in descending order; a table row of -1 where there are no keys."""
    counts = [-(-number // PAGE_MULTIPLE) for number in keys]
    table = torch.full((len(keys), max(counts)), -1, dtype=torch.int32)
    page, slots = sum(counts), []
    for row, (new, number, count) in enumerate(zip(queries, keys, counts, strict=True)):
        for place in range(count):
            page -= 1
            table[row, place] = page
        for position in range(number - new, number):
            known = position >= 0
            slots.append(
                int(table[row, position // PAGE_MULTIPLE]) * PAGE_MULTIPLE + position % PAGE_MULTIPLE if known else -1
            )
    return PagedMetadata(
        cu_seqlens_q=F.pad(torch.tensor(queries).cumsum(0), (1, 0)).to(device, torch.int32),
        seqused_k=torch.tensor(keys, dtype=torch.int32, device=device),
        block_table=table.to(device),
        slot_mapping=torch.tensor(slots, device=device),
        max_seqlen_q=max(queries),
        max_seqlen_k=max(keys),
    )
