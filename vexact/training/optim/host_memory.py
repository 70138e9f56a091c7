"""Host memory for many tensors at once, page-locked where a GPU reads it.

Page-locked memory is handed out in powers of two: alone, 384 MiB of rows would take 512. Together they fill pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_BYTES = 1 << 32  # of a piece, unless one tensor is larger
_ALIGNMENT = 512


def host_memory(sizes: Sequence[int], pinned: bool) -> list[Tensor]:
    """Bytes on the host, (size,) uint8 for each of ``sizes``, of unknown values; several share a storage."""
    found: dict[int, Tensor] = {}
    for indices in pieces(sizes):
        memory = torch.empty(sum(_room(sizes[i]) for i in indices), dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for index in indices:
            found[index] = memory[start : start + sizes[index]]
            start += _room(sizes[index])
    return [found[index] for index in range(len(sizes))]


def host_rows(
    like: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None, *, pinned: bool | None = None
) -> list[Tensor]:
    """Contiguous tensors on the host, of unknown values, with the shapes of those given and their dtypes, or others;
    page-locked where those are on a GPU, or as ``pinned`` says."""
    dtypes = [rows.dtype for rows in like] if dtypes is None else dtypes
    sizes = [rows.numel() * dtype.itemsize for rows, dtype in zip(like, dtypes, strict=True)]
    memory = host_memory(sizes, any(rows.is_cuda for rows in like) if pinned is None else pinned)
    return [held.view(dtype).view(rows.shape) for held, rows, dtype in zip(memory, like, dtypes, strict=True)]


def pieces(sizes: Sequence[int]) -> list[list[int]]:
    """The indices of the sizes that share a piece: each is the largest power of two that what is left can fill, so that
    rounding up the last ones costs little."""
    left, found = list(range(len(sizes))), []
    while left:
        total, largest = (of(_room(sizes[i]) for i in left) for of in (sum, max))
        capacity = max(min(_MOST_BYTES, 1 << total.bit_length() >> 1), _power_of_two(largest))
        piece: list[int] = []
        rest: list[int] = []
        for index in left:
            fits = _room(sizes[index]) <= capacity
            (piece if fits else rest).append(index)
            capacity -= _room(sizes[index]) * fits
        found.append(piece)
        left = rest
    return found


def _room(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _power_of_two(size: int) -> int:
    """The smallest that is not smaller."""
    return 1 << max(0, size - 1).bit_length()
