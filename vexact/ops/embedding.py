"""Token embedding whose gradient is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) int64 -> (T, H). The gradient adds tokens in order, without atomics.

    The row ``padding_idx`` gets no gradient from here, as in ``torch.nn.Embedding``.

    Raises:
        ValueError: ``ids`` or ``weight`` of another form; on the CPU also an id outside the table.
    """
    check_dims("embedding", 1, "(T,)", ids=ids)
    check_dims("embedding", 2, "(V, H)", weight=weight)
    check_floats("embedding", weight=weight)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"embedding: ids are {ids.dtype}, expected torch.int64")
    return apply(_Embedding, ids, weight, padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.padding_idx = weight.shape[0], padding_idx
        return backend("embedding", weight).forward(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        dweight = backend("embedding", dy).backward(dy.contiguous(), ids, ctx.num_rows)
        if ctx.padding_idx is not None:
            dweight[ctx.padding_idx].zero_()
        return None, dweight, None
