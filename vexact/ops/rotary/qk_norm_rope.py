"""Per-head RMSNorm of queries and keys, then the rotary embedding, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import alike, check_floats
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend
from vexact.ops.rms_norm import rms_norm_reference
from vexact.ops.rotary.rope import check_rope, rope_reference


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """``rope(rms_norm(q, q_weight), rms_norm(k, k_weight))``, rounded where the two ops round.

    Args:
        q: (T, Hq, D). k: (T, Hkv, D); views of a fused projection are read in place. q_weight, k_weight: (D,).
        positions: (T,) int64. cos_sin: (P, D) fp32, cosines in the first D/2 columns and sines in the last.

    Returns:
        Contiguous q' and k' of the input dtype.

    Raises:
        ValueError: a weight that is not (D,), or tensors that do not fit together; see :func:`vexact.ops.rope`.
    """
    check_rope("qk_norm_rope", q, k, positions, cos_sin)
    check_norms("qk_norm_rope", q, q_weight, k_weight)
    return apply(_QkNormRope, q, k, q_weight, k_weight, eps, positions, cos_sin)


def check_norms(op: str, q: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    """
    Raises:
        ValueError: a weight is not (D,) of the dtype of ``q`` (T, Hq, D).
    """
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != q.shape[-1:]:
            raise ValueError(f"{op}: {name} is {tuple(weight.shape)}, expected ({q.shape[-1]},)")
    if not (alike(q, q_weight) and alike(q, k_weight)):
        check_floats(op, q=q, q_weight=q_weight, k_weight=k_weight)


def qk_norm_rope_reference(x: Tensor, weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """One tensor (T, heads, D) in fp64, without intermediate rounding."""
    return rope_reference(rms_norm_reference(x, weight, eps), positions, cos_sin)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        op = backend("rotary.qk_norm_rope", q)
        q_out, k_out, q_rstd, k_rstd = op.forward(q, k, q_weight, k_weight, eps, positions, cos_sin)
        ctx.save_for_backward(q, k, q_weight, k_weight, q_rstd, k_rstd, positions, cos_sin)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None, None]:
        q, k, q_weight, k_weight, q_rstd, k_rstd, positions, cos_sin = ctx.saved_tensors
        dq, dk = backend("rotary.rope", dq).forward(dq, dk, positions, cos_sin, True)
        dq, dq_weight = _norm_backward(dq, q, q_weight, q_rstd)
        dk, dk_weight = _norm_backward(dk, k, k_weight, k_rstd)
        return dq, dk, dq_weight, dk_weight, None, None, None


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norm of (T, heads, D), whose rstd is (T, heads)."""
    width = x.shape[-1]
    rows = (tensor.reshape(-1, width) for tensor in (dy, x))
    dx, dweight = backend("rms_norm", x).backward(*rows, weight, rstd.flatten())
    return dx.view(x.shape), dweight
