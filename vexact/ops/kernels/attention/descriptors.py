"""Tensor descriptors of keys and values: blocks of rows travel through the tensor memory accelerator of sm_90."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels.attention.launch import key_columns, padded
from vexact.ops.kernels.linear.launch import capability

Descriptors = tuple[TensorDescriptor, TensorDescriptor | None, TensorDescriptor]


def row_descriptors(k: Tensor, v: Tensor, block_n: int) -> Descriptors | None:
    """Descriptors that load ``block_n`` rows of one head: the first columns of keys, the rest if there is a second tile
    of them, and values. None where pointers have to do.

    Args:
        k: (Tk, Hkv, D) or (num_pages, page_size, Hkv, D). v: likewise with Dv.

    A block of keys must lie in one page, tiles must fill the head dimensions exactly (a wider box would read the next
    head), and rows must be an equal number of aligned bytes apart, across pages too. Heads may have gaps between them:
    values are often a part of a wider product.
    """
    if capability(k.device)[0] < 9 or (k.dim() == 4 and k.shape[1] % block_n):
        return None
    first, rest = key_columns(k.shape[-1], v.shape[-1])
    if not (describable(k, first + rest) and describable(v, padded(v.shape[-1]))):
        return None
    more = _descriptor(k, block_n, rest) if rest else None
    return _descriptor(k, block_n, first), more, _descriptor(v, block_n, v.shape[-1])


def describable(rows: Tensor, tiles: int) -> bool:
    heads, dim = rows.shape[-2:]
    head_stride, row_stride = rows.stride(-2), rows.stride(-3)
    apart = (head_stride >= dim or heads == 1) and row_stride >= row_width(rows) and rows.shape[0] > 0
    pages_follow = rows.dim() == 3 or rows.stride(0) == rows.shape[1] * row_stride
    aligned = row_stride * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    return apart and pages_follow and aligned and dim == tiles


def _descriptor(rows: Tensor, block_n: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(rows, [rows.shape[:-2].numel(), row_width(rows)], [rows.stride(-3), 1], [block_n, columns])


def head_step(rows: Tensor) -> int:
    """Columns between the starts of two heads in a described row."""
    heads, dim = rows.shape[-2:]
    return rows.stride(-2) if heads > 1 else dim


def row_width(rows: Tensor) -> int:
    heads, dim = rows.shape[-2:]
    return (heads - 1) * head_step(rows) + dim
