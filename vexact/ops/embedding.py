"""Token embedding whose gradient is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.dispatch import backend


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) int64 -> (T, H). The gradient adds tokens in order, without atomics."""
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
