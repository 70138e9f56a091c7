"""CPU twin of combine."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.cpu.fma import fma
from vexact.ops.cpu.reduce import tree_sum


def forward(y: Tensor, weights: Tensor, slots: Tensor, shared: Tensor | None) -> Tensor:
    """y (P, H), weights (T, k), shared (T, H) -> (T, H)."""
    acc = torch.zeros(slots.shape[0], y.shape[1])
    for weight, slot in zip(weights.split(1, dim=1), slots.unbind(1), strict=True):
        acc = _where_taken(slot, fma(weight, _rows(y, slot), acc), acc)
    return (acc if shared is None else acc + shared.float()).to(y.dtype)


def total(dx: Tensor, slots: Tensor) -> Tensor:
    """(P, K) -> (T, K): a token's places added in order."""
    acc = torch.zeros(slots.shape[0], dx.shape[1])
    for slot in slots.unbind(1):
        acc = _where_taken(slot, acc + _rows(dx, slot), acc)
    return acc.to(dx.dtype)


def backward(dout: Tensor, y: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """dout (T, H) -> dy (P, H), dweights (T, k) fp32; zeros for a place or a pair that nothing came from."""
    dy, dweights, wide = torch.zeros_like(y), torch.zeros_like(weights), dout.float()
    for j, slot in enumerate(slots.unbind(1)):
        taken = slot >= 0
        dy[slot[taken].long()] = (weights[taken, j].unsqueeze(1) * wide[taken]).to(y.dtype)
        dweights[:, j] = torch.where(taken, tree_sum(wide * _rows(y, slot)), 0.0)
    return dy, dweights


def _rows(y: Tensor, slot: Tensor) -> Tensor:
    """The rows at (T,) places, fp32; any row for a pair without one."""
    return y.index_select(0, slot.clamp_min(0)).float()


def _where_taken(slot: Tensor, new: Tensor, old: Tensor) -> Tensor:
    taken = slot >= 0
    return new if taken.all() else torch.where(taken.unsqueeze(1), new, old)
