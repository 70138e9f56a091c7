"""How the fused cross-entropy cuts tokens and vocabulary into pieces whose workspace is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from vexact.ops.kernels.sizes import cdiv

ROW_MULTIPLE = 128  # tokens of a tile


def balanced_size(total: int, limit: int, multiple: int) -> int:
    """The length, a multiple of ``multiple`` and at most ``limit`` where that allows, that cuts ``total`` evenly."""
    limit = max(limit // multiple, 1) * multiple
    pieces = max(cdiv(total, limit), 1)
    return max(cdiv(cdiv(total, pieces), multiple), 1) * multiple


def cut(total: int, size: int) -> Iterator[slice]:
    """Slices of ``size``, the last one shorter, that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def padded(columns: int) -> int:
    """``columns`` rounded up so that every row of a workspace starts at an address descriptors accept."""
    return cdiv(columns, 16) * 16
