"""Differentiable attention over packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.attention.checks import check_ends
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax attention (Vaswani et al. 2017) by online softmax (Milakov & Gimelshein 2018) over fixed key blocks.

    Args:
        q: (T, Hq, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv); Hq is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: (B+1,) int32.
        causal: query i of n sees keys up to i + kv_len - n.

    Returns:
        out (T, Hq, Dv) in the dtype of q and lse (T, Hq) fp32 (natural log); rows that see no key give 0 and -inf.
        Rows past the last sequence are 0 and -inf, and their gradients 0. Differentiable through ``out``.

    Raises:
        ValueError: tensors that do not fit together (see :mod:`vexact.ops.attention.checks`).
    """
    check_ends("cu_seqlens_q", cu_seqlens_q)
    check_ends("cu_seqlens_k", cu_seqlens_k, like=cu_seqlens_q)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return apply(_PackedAttention, q, k, v, lengths, softmax_scale, causal)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor, int, int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = backend("attention", q).packed_forward(q, k, v, *lengths, scale, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.scale, ctx.causal = lengths, scale, causal
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        op = backend("attention", dout)
        grads = op.packed_backward(dout.contiguous(), *ctx.saved_tensors, *ctx.lengths, ctx.scale, ctx.causal)
        return *grads, None, None, None
