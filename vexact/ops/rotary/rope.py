"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half layout as in Hugging Face models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import alike, check_dims, check_floats, check_per_row
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their absolute positions; fp32 arithmetic, one rounding.

    Args:
        q: (T, Hq, D). k: (T, Hkv, D). positions: (T,) int64.
        cos_sin: (P, D) fp32, cosines in the first D/2 columns and sines in the last.

    Raises:
        ValueError: tensors that do not fit together; on the CPU also a position outside the table.
    """
    check_rope("rope", q, k, positions, cos_sin)
    return apply(_Rope, q, k, positions, cos_sin)


def check_rope(op: str, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """
    Raises:
        ValueError: the tensors do not fit together.
    """
    check_dims(op, 3, "(T, heads, D)", q=q, k=k)
    if not alike(q, k):
        check_floats(op, q=q, k=k)
    width = q.shape[2]
    if width % 2 or k.shape[2] != width or cos_sin.dim() != 2 or cos_sin.shape[1] != width:
        raise ValueError(
            f"{op}: head dims q {width}, k {k.shape[2]} and cos_sin {tuple(cos_sin.shape)}; "
            "q and k must have one even width D, cos_sin (P, D)"
        )
    if cos_sin.dtype != torch.float32:
        raise ValueError(f"{op}: cos_sin is {cos_sin.dtype}, expected torch.float32")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: q has {q.shape[0]} tokens but k has {k.shape[0]}")
    check_per_row(op, q.shape[0], torch.int64, positions=positions)


def rope_reference(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """One tensor (T, heads, D) rotated in fp64."""
    cos, sin = cos_sin.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = x.double().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions, cos_sin)
        return backend("rotary.rope", q).forward(q, k, positions, cos_sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None]:
        positions, cos_sin = ctx.saved_tensors
        dq, dk = backend("rotary.rope", dq).forward(dq, dk, positions, cos_sin, True)
        return dq, dk, None, None
