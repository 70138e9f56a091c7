"""What attention refuses, alike on CPU and GPU.

Shapes and dtypes are compared always. Values of lengths and tables are looked at where that waits for no device: on the
CPU, and where a call reads them anyhow.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from vexact.ops.checks import FLOATS

MAX_HEAD_DIM = 256


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (T, Hq, D), k (..., Hkv, D) and v (..., Hkv, Dv), packed or in pages.

    Raises:
        ValueError: dtypes differ or are not fp32, bf16 or fp16; the head counts do not divide; a head dimension is
            above 256; the last dimension of a tensor is not contiguous; keys and values are not equally many.
    """
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; q, k and v must share fp32, bf16 or fp16")
    if q.dim() != 3 or k.dim() not in (3, 4) or k.shape[:-1] != v.shape[:-1]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention: {shapes}; expected (T, Hq, D), (Tk, Hkv, D) and (Tk, Hkv, Dv), or pages of keys")
    num_heads, num_kv_heads = q.shape[-2], k.shape[-2]
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"attention: {num_heads} query heads over {num_kv_heads} key heads; the first must be a multiple"
        )
    if q.shape[-1] != k.shape[-1] or not 0 < max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM:
        raise ValueError(
            f"attention: head dims q {q.shape[-1]}, k {k.shape[-1]}, v {v.shape[-1]}; q = k, all at most {MAX_HEAD_DIM}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"attention: q is on {q.device} but {name} is on {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"attention: {name} has last stride {tensor.stride(-1)}; call .contiguous()")


def check_pages(op: str, k: Tensor, v: Tensor, kv_cache: tuple[Tensor, Tensor]) -> None:
    """Keys (T, Hkv, D) and values (T, Hkv, Dv) beside their pages (num_pages, page_size, Hkv, ...).

    Raises:
        ValueError: heads, widths, dtypes or devices are not those of the cache, or the numbers of a head have gaps
            between them there.
    """
    for name, rows, pages in (("keys", k, kv_cache[0]), ("values", v, kv_cache[1])):
        if rows.shape[1:] != pages.shape[2:] or rows.dtype != pages.dtype or rows.device != pages.device:
            raise ValueError(
                f"{op}: {name} are {rows.dtype} {tuple(rows.shape)} on {rows.device}, the cache {pages.dtype} "
                f"{tuple(pages.shape)} on {pages.device}; heads, width, dtype and device must be the same"
            )
        if pages.stride(-1) != 1 and pages.shape[-1] > 1:
            raise ValueError(f"{op}: the cache of {name} has last stride {pages.stride(-1)}; it must be 1")


def check_scale(softmax_scale: float) -> None:
    """
    Raises:
        ValueError: the scale is not a positive finite number (masking with -inf needs its sign).
    """
    if not 0.0 < softmax_scale < math.inf:
        raise ValueError(f"attention: softmax_scale is {softmax_scale}; it must be positive and finite")


def check_ends(name: str, ends: Tensor, like: Tensor | None = None) -> None:
    """Cumulative lengths: (B + 1,) int32, where ``like``, (B + 1,), says how many.

    Raises:
        ValueError: another shape or dtype, or gaps between the numbers.
    """
    if ends.dim() != 1 or ends.shape[0] == 0 or ends.dtype != torch.int32:
        raise ValueError(
            f"{name} is {ends.dtype} {tuple(ends.shape)}; expected int32 (sequences + 1,), starting with 0"
        )
    _check_dense(name, ends)
    if like is not None and ends.shape != like.shape:
        raise ValueError(
            f"cu_seqlens_q has {like.shape[0] - 1} sequences but {name} has {ends.shape[0] - 1}; they must be as many"
        )


def check_counts(name: str, counts: Tensor, cu_seqlens_q: Tensor) -> None:
    """Keys per sequence: (B,) int32.

    Raises:
        ValueError: another shape or dtype, or gaps between the numbers.
    """
    batch = cu_seqlens_q.shape[0] - 1
    if counts.shape != (batch,) or counts.dtype != torch.int32:
        raise ValueError(
            f"{name} is {counts.dtype} {tuple(counts.shape)}; cu_seqlens_q has {batch} sequences: expected int32 "
            f"({batch},)"
        )
    _check_dense(name, counts)


def _check_dense(name: str, numbers: Tensor) -> None:
    if not numbers.is_contiguous():
        raise ValueError(f"{name} has stride {numbers.stride(0)}; call .contiguous()")


def check_table(block_table: Tensor, cu_seqlens_q: Tensor) -> None:
    """(B, P) int32.

    Raises:
        ValueError: another shape or dtype.
    """
    batch = cu_seqlens_q.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}; cu_seqlens_q has {batch} sequences: "
            f"expected int32 ({batch}, pages)"
        )
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(f"block_table has last stride {block_table.stride(1)}; call .contiguous()")


def readable(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device, and outside of a captured graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_end_values(name: str, ends: Tensor, rows: int | None = None, longest: int | None = None) -> None:
    """
    Args:
        ends: cumulative lengths. rows: of the tensor they cut. longest: what the caller says is the longest sequence.

    Raises:
        ValueError: they do not start with 0, decrease, or do not fit ``rows`` or ``longest``.
    """
    values = ends.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} starts with {values[0]}; it must start with 0")
    lengths = [end - start for start, end in pairwise(values)]
    most = max(lengths, default=0)
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name} decreases: sequence {lengths.index(min(lengths))} has {min(lengths)} rows")
    if rows is not None and values[-1] > rows:
        raise ValueError(f"{name} ends with {values[-1]}, but there are only {rows} rows")
    if longest is not None and most > longest:
        raise ValueError(f"{name} holds a sequence of {most} rows, but its max_seqlen is {longest}")


def check_page_values(counts: Tensor, block_table: Tensor, page_size: int, num_pages: int, longest: int | None) -> None:
    """
    Args:
        counts: (B,) keys of each sequence. longest: what the caller says is the most.

    Raises:
        ValueError: a count is negative, above ``longest`` or more than the pages of its row hold, or a page that is
            used does not exist.
    """
    for row, count in enumerate(counts.tolist()):
        room = block_table.shape[1] * page_size
        if not 0 <= count <= room:
            raise ValueError(f"seqused_k[{row}] is {count}; a row of block_table holds 0 to {room} keys")
        if longest is not None and count > longest:
            raise ValueError(f"seqused_k[{row}] is {count}, but max_seqlen_k is {longest}")
        for place, page in enumerate(block_table[row, : -(-count // page_size)].tolist()):
            if not 0 <= page < num_pages:
                raise ValueError(f"block_table[{row}, {place}] is {page}, but there are {num_pages} pages")
