"""CPU twin of grouped_linear: every expert's rows go through the product that ``linear`` uses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from vexact.ops.cpu import swiglu
from vexact.ops.cpu.product import product


def forward(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    """(T, K) with rows (P,), or (P, K); weight (E, N, K) -> (P, N)."""
    num_places = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_zeros(num_places, weight.shape[1])
    for expert, places in _experts(offsets):
        out[places] = product(_rows_of(x, rows, places, top_k), weight[expert].float().T).to(x.dtype)
    return out


def swiglu_forward(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    """The same with weight (E, 2I, K), through SwiGLU -> (P, I)."""
    return swiglu.forward(forward(x, weight, rows, offsets, top_k))


def grad_input(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dy (P, N) -> (P, K), per place."""
    out = dy.new_zeros(dy.shape[0], weight.shape[2])
    for expert, places in _experts(offsets):
        out[places] = product(dy[places].float(), weight[expert].float()).to(dy.dtype)
    return out


def grad_weight(dy: Tensor, x: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int, ranks: int = 1) -> Tensor:
    """(E, N, K); zeros for an expert without places. With ``ranks``, (ranks * E, N, K) by rank and expert, where
    ``offsets`` are by expert and rank."""
    out = x.new_zeros(offsets.shape[0] - 1, dy.shape[1], x.shape[1])
    for expert, places in _experts(offsets):
        out[expert] = dy[places].float().T @ _rows_of(x, rows, places, top_k)
    return out.unflatten(0, (-1, ranks)).transpose(0, 1).flatten(0, 1)


def add_grad_weight(
    total: Tensor, dy: Tensor, x: Tensor, offsets: Tensor, ranks: int, counted: int, fresh: bool
) -> None:
    """((total + g0) + g1) + ... in place, of the first ``counted`` gradients of ``grad_weight``; total (E, N, K) fp32,
    of unknown values when ``fresh``."""
    pieces = grad_weight(dy, x, None, offsets, 1, ranks).unflatten(0, (ranks, -1))
    for rank, piece in enumerate(pieces[:counted]):
        if fresh and rank == 0:
            total.copy_(piece)
        else:
            total.add_(piece)


def _experts(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Every expert that has places, and which."""
    ends = offsets.tolist()
    for expert, (begin, end) in enumerate(pairwise(ends)):
        if end > begin:
            yield expert, slice(begin, end)


def _rows_of(x: Tensor, rows: Tensor | None, places: slice, top_k: int) -> Tensor:
    """fp32."""
    return (x[places] if rows is None else x.index_select(0, rows[places] // top_k)).float()
