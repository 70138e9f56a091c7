"""Host memory for many tensors at once, page-locked where a GPU reads it.

In few large pieces: they go back to the machine when the last tensor in them is freed, where malloc would keep small
ones, and page-locked ones are made faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vexact.training.optim.page_locked import page_locked

_MOST_BYTES = 1 << 32  # of a piece, unless one tensor is larger
_ALIGNMENT = 512


def host_memory(sizes: Sequence[int], pinned: bool) -> list[Tensor]:
    """Zeros on the host, (size,) uint8 for each of ``sizes``; several share a storage.

    Where ``pinned``, copies from and to the GPU must have ended before the memory is freed.
    """
    found: list[Tensor] = []
    for piece in pieces(sizes):
        total = sum(map(_room, piece))
        memory = page_locked(total) if pinned and total else torch.zeros(total, dtype=torch.uint8)
        start = 0
        for size in piece:
            found.append(memory[start : start + size])
            start += _room(size)
    return found


def host_rows(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None, *, pinned: bool | None = None
) -> list[Tensor]:
    """Contiguous zeros on the host, with the shapes of those given and their dtypes, or others;
    page-locked where those are on a GPU, or as ``pinned`` says."""
    dtypes = [rows.dtype for rows in like] if dtypes is None else dtypes
    sizes = [rows.numel() * dtype.itemsize for rows, dtype in zip(like, dtypes, strict=True)]
    memory = host_memory(sizes, any(rows.is_cuda for rows in like) if pinned is None else pinned)
    return [held.view(dtype).view(rows.shape) for held, rows, dtype in zip(memory, like, dtypes, strict=True)]


def pieces(sizes: Sequence[int]) -> list[list[int]]:
    """The sizes, in order, in pieces as large as they may be.

    >>> pieces([1 << 30, 3 << 30, 5, 5 << 30, 7])
    [[1073741824, 3221225472], [5], [5368709120], [7]]
    """
    found: list[list[int]] = []
    left = 0
    for size in sizes:
        if not found or _room(size) > left:
            found.append([])
            left = _MOST_BYTES
        found[-1].append(size)
        left -= _room(size)
    return found


def _room(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
