"""Token embedding whose gradient is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats
from vexact.ops.dispatch import backend


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) int64 -> (T, H). The gradient adds tokens in order, without atomics.

    Raises:
        ValueError: ``ids`` or ``weight`` of another form; on the CPU also an id outside the table.
    """
    check_dims("embedding", 1, "(T,)", ids=ids)
    check_dims("embedding", 2, "(V, H)", weight=weight)
    check_floats("embedding", weight=weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids are {ids.dtype}, expected torch.int64")
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = weight.shape[0]
        return backend("embedding", weight).forward(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, backend("embedding", dy).backward(dy.contiguous(), ids, ctx.num_rows)
