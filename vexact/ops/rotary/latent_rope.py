"""Queries and keys of multi-head latent attention: the rotated slice of every head, and whole heads put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.checks import check_dims, check_floats, check_per_row
from vexact.ops.differentiate import apply
from vexact.ops.dispatch import backend

Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def latent_rope(
    q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotates the last R numbers of every query head, and the R numbers that all heads' keys share; heads of N plain
    and R rotated numbers come out (DeepSeek-V2, arXiv 2405.04434, section 2.1.3). Bits are those of :func:`rope`.

    Args:
        q: (T, H, N + R). k_plain: (T, H, N). k_rotated: (T, R). positions: (T,) int64.
        cos_sin: (P, R) fp32, cosines in the first R/2 columns and sines in the last.
        interleaved: neighbours turn together, and come out as two halves; else the halves do.

    Returns:
        Contiguous queries and keys, (T, H, N + R) each.

    Raises:
        ValueError: tensors that do not fit together; on the CPU also a position outside the table.
    """
    check_dims("latent_rope", 3, "(T, heads, width)", q=q, k_plain=k_plain)
    check_dims("latent_rope", 2, "(T, R)", k_rotated=k_rotated)
    check_floats("latent_rope", q=q, k_plain=k_plain, k_rotated=k_rotated)
    (tokens, heads, width), rotated = q.shape, k_rotated.shape[1]
    if k_plain.shape != (tokens, heads, width - rotated) or k_rotated.shape[0] != tokens:
        raise ValueError(
            f"latent_rope: q is {tuple(q.shape)}, k_plain {tuple(k_plain.shape)} and k_rotated "
            f"{tuple(k_rotated.shape)}; expected (T, H, N + R), (T, H, N) and (T, R)"
        )
    if rotated % 2 or cos_sin.dim() != 2 or cos_sin.shape[1] != rotated:
        raise ValueError(
            f"latent_rope: k_rotated is {rotated} wide and cos_sin {tuple(cos_sin.shape)}; "
            "expected an even width R and (P, R)"
        )
    if cos_sin.dtype != torch.float32:
        raise ValueError(f"latent_rope: cos_sin is {cos_sin.dtype}, expected torch.float32")
    check_per_row("latent_rope", tokens, torch.int64, positions=positions)
    return apply(_LatentRope, q, k_plain, k_rotated, positions, cos_sin, interleaved)


def rotated_and_joined(
    rope: Rope, q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """:func:`latent_rope` by a ``rope`` and torch."""
    rotated = k_rotated.shape[1]
    q_plain, q_rotated = q.split((q.shape[2] - rotated, rotated), dim=2)
    k_rotated = k_rotated.unsqueeze(1)
    if interleaved:
        q_rotated, k_rotated = _halves(q_rotated), _halves(k_rotated)
    q_rotated, k_rotated = rope(q_rotated, k_rotated, positions, cos_sin)
    return torch.cat((q_plain, q_rotated), dim=2), torch.cat((k_plain, k_rotated.expand(-1, q.shape[1], -1)), dim=2)


def _halves(x: Tensor) -> Tensor:
    """(a0, b0, a1, b1, …) -> (a0, a1, …, b0, b1, …): pairs that turn together, as rotate-half wants them."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _pairs(x: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class _LatentRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_plain: Tensor,
        k_rotated: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions, cos_sin)
        ctx.rotated, ctx.interleaved = k_rotated.shape[1], interleaved
        return backend("rotary.latent_rope", q).forward(q, k_plain, k_rotated, positions, cos_sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        positions, cos_sin = ctx.saved_tensors
        sizes = dq.shape[2] - ctx.rotated, ctx.rotated
        (dq_plain, dq_rotated), (dk_plain, dk_rotated) = dq.split(sizes, dim=2), dk.split(sizes, dim=2)
        dk_rotated = dk_rotated.sum(1, keepdim=True)
        dq_rotated, dk_rotated = backend("rotary.rope", dq).forward(dq_rotated, dk_rotated, positions, cos_sin, True)
        if ctx.interleaved:
            dq_rotated, dk_rotated = _pairs(dq_rotated), _pairs(dk_rotated)
        return torch.cat((dq_plain, dq_rotated), dim=2), dk_plain, dk_rotated.squeeze(1), None, None, None
