"""FlashAttention's variable-length call, with its names and meanings, on the invariant kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.attention.checks import (
    check_counts,
    check_end_values,
    check_ends,
    check_heads,
    check_page_values,
    check_scale,
    check_table,
    readable,
)
from vexact.ops.attention.packed import packed_attention
from vexact.ops.dispatch import backend


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    page_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end, over packed keys (differentiable) or over a paged cache.

    Args:
        q: (T, Hq, D). k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv), or with a block table (num_pages, page_size, Hkv, ...).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32. With a block table, key counts come from ``seqused_k`` (also called
            ``cache_seqlens``, (B,) int32) or, without it, from ``cu_seqlens_k``.
        max_seqlen_q, max_seqlen_k: if omitted they are read from the device, which waits; a graph capture refuses.
            Lengths and pages are checked value by value on the CPU, and on a GPU where they are read for this.
        softmax_scale: D ** -0.5 if omitted.
        causal: aligned at the bottom right, query i of n sees keys up to i + kv_len - n.
        deterministic: accepted either way, the kernels always are.
        block_table: (B, P) int32, also called ``page_table``; entries past a sequence's last page are never read.
        return_attn_probs, return_softmax_lse: either asks for the log-sum-exp. Probabilities are never materialised.
        dropout_p, window_size, softcap, alibi_slopes, seqused_q: only their defaults are supported.

    Returns:
        out (T, Hq, Dv), or (out, lse) with lse (Hq, T) fp32 in natural logarithm, the layout of FlashAttention. Rows
        past the last sequence are 0 and -inf, and so are their gradients 0.

    Raises:
        ValueError: an argument that is not supported has been set, tensors do not fit together, or lengths do not fit
            the tensors; the message names the argument.
    """
    _refuse(dropout_p=(dropout_p, 0.0), softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None))
    _refuse(seqused_q=(seqused_q, None))
    if window_size is not None and tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size={window_size} is not supported; leave it at (-1, -1)")
    table = _one_of(block_table=block_table, page_table=page_table)
    used = _one_of(seqused_k=seqused_k, cache_seqlens=cache_seqlens)
    check_heads(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    check_scale(scale)
    check_ends("cu_seqlens_q", cu_seqlens_q)
    longest_q = _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
    if table is None:
        out, lse = _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, used, longest_q, max_seqlen_k, scale, causal)
    else:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            raise ValueError("block_table: a paged cache has no backward; use torch.no_grad() or packed keys")
        keys = _key_counts(used, cu_seqlens_q, cu_seqlens_k)
        check_table(table, cu_seqlens_q)
        longest_k = _most_keys(max_seqlen_k, keys, table, k)
        op = backend("attention", q)
        out, lse = op.paged_forward(q, k, v, cu_seqlens_q, keys, table, longest_q, longest_k, scale, causal)
    return (out, lse.T) if return_attn_probs or return_softmax_lse else out


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    used: Tensor | None,
    longest_q: int,
    max_seqlen_k: int | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    if used is not None:
        raise ValueError("seqused_k (cache_seqlens) is only supported with a block_table; pass cu_seqlens_k")
    if cu_seqlens_k is None:
        raise ValueError("cu_seqlens_k is required for packed keys")
    if k.dim() != 3:
        raise ValueError(f"k is {tuple(k.shape)}; keys in pages need a block_table, packed ones are (Tk, Hkv, D)")
    check_ends("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
    longest_k = _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    return packed_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale, causal)


def _key_counts(used: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    if used is None:
        if cu_seqlens_k is None:
            raise ValueError(
                "block_table needs seqused_k (or cache_seqlens, or cu_seqlens_k), the keys of each sequence"
            )
        check_ends("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
        if readable(cu_seqlens_k):
            check_end_values("cu_seqlens_k", cu_seqlens_k)
        used = cu_seqlens_k.diff()
    check_counts("seqused_k", used, cu_seqlens_q)
    return used


def _most_keys(given: int | None, counts: Tensor, table: Tensor, pages: Tensor) -> int:
    """The given maximum or the largest of ``counts``, which are looked at where that costs no waiting of its own."""
    if pages.dim() != 4:
        raise ValueError(f"k is {tuple(pages.shape)}; with a block_table it must be (pages, page_size, Hkv, D)")
    if given is None or readable(counts):
        _may_read("max_seqlen_k", counts)
        check_page_values(counts, table, pages.shape[1], pages.shape[0], given)
    return int(counts.max()) if given is None and counts.numel() else int(given or 0)


def _refuse(**arguments: tuple[object, object]) -> None:
    """Raise for an argument given as (value, default) that is not at its default."""
    for name, (value, default) in arguments.items():
        if value is not default and value != default:
            raise ValueError(f"{name}={value!r} is not supported; leave it at {default!r}")


def _one_of(**arguments: Tensor | None) -> Tensor | None:
    """The value given under one of several names."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are the same argument; pass one of them")
    return next(iter(given.values()), None)


def _longest(name: str, given: int | None, ends: Tensor, rows: int) -> int:
    """The given maximum or the largest step of ``ends``, which are looked at where that costs no waiting of its own."""
    if given is None or readable(ends):
        _may_read(name, ends)
        check_end_values(name.replace("max_", "cu_").replace("seqlen", "seqlens"), ends, rows, given)
    return int(ends.diff().max()) if given is None and ends.shape[0] > 1 else int(given or 0)


def _may_read(name: str, lengths: Tensor) -> None:
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name} is required while a CUDA graph is captured: it would be read from the device")
