"""Which rows of a tensor lie on this rank."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def row_range(tensor: Tensor) -> tuple[int, int]:
    """First row, and one past the last, that this rank holds; rows are split evenly, the last ranks have fewer or none.

    >>> import torch
    >>> row_range(torch.zeros(5, 2))
    (0, 5)
    """
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    assert tensor.placements == (Shard(0),), f"split as {tensor.placements}, not by rows over one dimension"
    count, mesh = len(tensor), tensor.device_mesh
    size = math.ceil(count / mesh.size())
    start = min(mesh.get_local_rank() * size, count)
    stop = min(start + size, count)
    assert len(tensor.to_local()) == stop - start
    return start, stop
