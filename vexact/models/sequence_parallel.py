"""Sequence parallelism: a rank holds a slice of the tokens, and around attention a slice of the heads instead.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509). Everything but attention works row by row, and attention head
by head, so every number is still produced by one program on one rank: no bit of the forward depends on S, the number of
ranks that share the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops import PackedMetadata


@dataclass(frozen=True, slots=True, eq=False)
class HeadExchange:
    """Trades token slices for head slices among the S ranks of ``group``, and back; all of them call it together.

    Rank r holds the tokens r*n ... r*n + n - 1 of S*n. S divides the number of query heads. Where it does not divide
    the key heads, these are repeated until it does; every query head keeps its own key head.
    """

    group: dist.ProcessGroup
    size: int  # S

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token slices q (n, Hq, D), k (n, Hkv, D), v (n, Hkv, Dv) -> head slices (S*n, Hq/S, D), (S*n, h, D) and
        (S*n, h, Dv) with h = lcm(S, Hkv)/S."""
        q, k, v = _ToHeads.apply(self, q, k, v)
        return q, k, v

    def to_tokens(self, out: Tensor) -> Tensor:
        """Head slice (S*n, Hq/S, Dv) -> token slice (n, Hq, Dv)."""
        result: Tensor = _ToTokens.apply(self, out)
        return result

    def trade(self, parts: Tensor) -> Tensor:
        """(S, ...), one part for each rank -> (S, ...), the part that each rank had for this one."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received


@dataclass(frozen=True, slots=True, eq=False)
class SlicedMetadata:
    """Packed sequences, S*n tokens in all, of which this rank has n; what attention needs to see them all."""

    packed: PackedMetadata
    exchange: HeadExchange

    def attend(self, attention: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """``attention`` over whole sequences, for this rank's tokens: q (n, Hq, D), k (n, Hkv, D), v (n, Hkv, Dv) ->
        (n, Hq, Dv)."""
        out = attention(*self.exchange.to_heads(q, k, v), self.packed, softmax_scale)
        return self.exchange.to_tokens(out)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, (num_tokens, num_kv_heads, width) = exchange.size, k.shape
        ctx.exchange, ctx.copies = exchange, lcm(size, num_kv_heads) // num_kv_heads
        kv_heads = num_kv_heads * ctx.copies // size
        ctx.shapes = (q.shape[1] // size, width), (kv_heads, width), (kv_heads, v.shape[2])
        parts = q.new_empty(size, num_tokens, sum(map(prod, ctx.shapes)))
        for part, heads in zip(_split(parts, ctx.shapes), (q, _repeated(k, ctx.copies), _repeated(v, ctx.copies))):
            part.copy_(heads.unflatten(1, (size, -1)).transpose(0, 1))
        q, k, v = _split(exchange.trade(parts).flatten(0, 1), ctx.shapes)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        size = ctx.exchange.size
        parts = dq.new_empty(size, dq.shape[0] // size, sum(map(prod, ctx.shapes)))
        for part, heads in zip(_split(parts, ctx.shapes), (dq, dk, dv)):
            part.copy_(heads.unflatten(0, (size, -1)))
        dq, dk, dv = (heads.transpose(0, 1).flatten(1, 2) for heads in _split(ctx.exchange.trade(parts), ctx.shapes))
        return None, dq, _summed(dk, ctx.copies), _summed(dv, ctx.copies)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, out: Tensor) -> Tensor:
        ctx.exchange = exchange
        received = exchange.trade(out.unflatten(0, (exchange.size, -1)).contiguous())  # (S, n, Hq/S, D)
        return received.transpose(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
        parts = dout.unflatten(1, (ctx.exchange.size, -1)).transpose(0, 1).contiguous()
        return None, ctx.exchange.trade(parts).flatten(0, 1)


def _split(rows: Tensor, shapes: tuple[tuple[int, int], ...]) -> Iterator[Tensor]:
    """Views (..., heads, width) of the queries, keys and values that lie side by side in a token's row."""
    for part, shape in zip(rows.split([prod(shape) for shape in shapes], dim=-1), shapes, strict=True):
        yield part.unflatten(-1, shape)


def _repeated(heads: Tensor, copies: int) -> Tensor:
    """(n, Hkv, D) -> (n, Hkv * copies, D), the copies of a head side by side."""
    return heads if copies == 1 else heads.repeat_interleave(copies, dim=1)


def _summed(heads: Tensor, copies: int) -> Tensor:
    """The gradient of :func:`_repeated`: copies are added in fp32, in the order of their ranks."""
    if copies == 1:
        return heads
    first, *others = heads.unflatten(1, (-1, copies)).unbind(2)
    total = first.float()
    for part in others:
        total = total + part.float()
    return total.to(heads.dtype)
