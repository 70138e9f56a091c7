"""FlashAttention as it is installed: what the names ``flash_attention_2`` and ``flash_attention_3`` run, on CUDA only.

FlashAttention-2 is the package ``flash_attn`` or, without it, ``torch.nn.attention.varlen``; FlashAttention-3 is the
package ``flash_attn_interface``. Neither is batch-invariant here. Of a paged cache the keys in use are gathered into
packed rows before every call, since not every one of them reads pages of any size: right, but slower than they can be,
and nothing for a CUDA graph. Where FlashAttention-2 reads pages, ``paged.py`` has it read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.ops.attention.checks import check_heads, check_scale
from vexact.ops.attention.interface import KVCache, write_kv
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata

# (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal) -> out
Varlen = Callable[..., Tensor]
HALF = (torch.float16, torch.bfloat16)


def flash_attention_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None = None,
    causal: bool = True,
) -> Tensor:
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691), with the signature of :func:`vexact.ops.attention`.

    Raises:
        ValueError: tensors it does not take, or it is not installed; the message says what would make it work.
    """
    return _attend("flash_attention_2", _varlen_2, q, k, v, metadata, softmax_scale, kv_cache, causal)


def flash_attention_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None = None,
    causal: bool = True,
) -> Tensor:
    """FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), with the signature of :func:`vexact.ops.attention`.

    Raises:
        ValueError: tensors it does not take, or it is not installed; the message says what would make it work.
    """
    return _attend("flash_attention_3", _varlen_3, q, k, v, metadata, softmax_scale, kv_cache, causal)


def _attend(
    name: str,
    find: Callable[[], Varlen],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None,
    causal: bool,
) -> Tensor:
    check_tensors(name, q, k, v)
    check_scale(softmax_scale)
    varlen = find()
    if isinstance(metadata, PackedMetadata):
        cu_q = cu_k = metadata.cu_seqlens
        longest_q = longest_k = metadata.max_seqlen
    else:
        if kv_cache is None:
            raise ValueError(f"{name}: paged metadata needs kv_cache=(k_cache, v_cache)")
        write_kv(k, v, kv_cache, metadata.slot_mapping)
        k, v, cu_k = packed_keys(kv_cache, metadata)
        cu_q, longest_q, longest_k = metadata.cu_seqlens_q, metadata.max_seqlen_q, metadata.max_seqlen_k
    return varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, softmax_scale, causal)


def check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError for tensors that FlashAttention does not take."""
    check_heads(q, k, v)
    if q.device.type != "cuda":
        raise ValueError(f"{name} runs on CUDA only, q is on {q.device}; use sdpa or triton-invariant there")
    if q.dtype not in HALF:
        raise ValueError(f"{name} takes fp16 or bf16, q is {q.dtype}; compute in bfloat16, or use sdpa")
    if v.shape[-1] != q.shape[-1] or q.shape[-1] % 8:
        raise ValueError(
            f"{name} takes one head dim for q, k and v, a multiple of 8; here {q.shape[-1]} and {v.shape[-1]}; use sdpa"
        )


def packed_keys(kv_cache: KVCache, metadata: PagedMetadata) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in use as rows (Tk, Hkv, D), sequence after sequence, and their cumulative lengths (B+1,) int32.

    Finding out how many there are waits for the device.
    """
    used, page_size = metadata.seqused_k.long(), kv_cache[0].shape[1]
    position = torch.arange(metadata.block_table.shape[1] * page_size, device=used.device)
    page = metadata.block_table.long().repeat_interleave(page_size, dim=1)  # (B, P * page_size), -1 where there is none
    slots = (page * page_size + position % page_size)[position < used.unsqueeze(1)]
    ends = F.pad(used.cumsum(0), (1, 0)).to(torch.int32)
    keys, values = (pages.flatten(0, 1)[slots] for pages in kv_cache)
    return keys, values, ends


@cache
def _varlen_2() -> Varlen:
    try:
        package = import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return _torch_varlen()
    return adapt_package(package.flash_attn_varlen_func)


@cache
def _varlen_3() -> Varlen:
    try:
        package = import_module("flash_attn_interface")
    except ImportError as problem:
        raise ValueError(
            f"flash_attention_3 needs the package flash_attn_interface (FlashAttention-3): {problem}; use "
            "flash_attention_2, sdpa or triton-invariant"
        ) from None
    return adapt_package(package.flash_attn_varlen_func)


def _torch_varlen() -> Varlen:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise ValueError(
            f"flash_attention_2 needs the package flash_attn, or torch.nn.attention.varlen of torch 2.11 or newer "
            f"(this is {torch.__version__}); use sdpa or triton-invariant"
        ) from None
    return adapt_torch(varlen_attn)


def adapt_package(function: Callable[..., Any]) -> Varlen:
    """``flash_attn_varlen_func`` of either package; some versions return the log-sum-exp as well."""

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
    ) -> Tensor:
        result = function(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return varlen


def adapt_torch(function: Callable[..., Any]) -> Varlen:
    """``varlen_attn``; until it takes ``enable_gqa`` every key head is repeated for the query heads that share it."""
    grouped = "enable_gqa" in inspect.signature(function).parameters

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
    ) -> Tensor:
        group, options = q.shape[1] // k.shape[1], {}
        if group > 1 and grouped:
            options = {"enable_gqa": True}
        elif group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        window = (-1, 0) if causal else (-1, -1)
        out: Tensor = function(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **options)
        return out

    return varlen
