"""CPU twin of combine."""

from __future__ import annotations

import torch
from torch import Tensor

from vexact.ops.cpu.fma import fma
from vexact.ops.cpu.reduce import tree_sum


def forward(y: Tensor, weights: Tensor, slots: Tensor, shared: Tensor | None) -> Tensor:
    """y (P, H), weights (T, k), shared (T, H) -> (T, H)."""
    acc = torch.zeros(slots.shape[0], y.shape[1])
    for j in range(slots.shape[1]):
        tokens, rows = _taken(y, slots[:, j])
        acc[tokens] = fma(weights[tokens, j].unsqueeze(1), rows, acc[tokens])
    return (acc if shared is None else acc + shared.float()).to(y.dtype)


def total(dx: Tensor, slots: Tensor) -> Tensor:
    """(P, K) -> (T, K): a token's places added in order."""
    acc = torch.zeros(slots.shape[0], dx.shape[1])
    for j in range(slots.shape[1]):
        tokens, rows = _taken(dx, slots[:, j])
        acc[tokens] += rows
    return acc.to(dx.dtype)


def backward(dout: Tensor, y: Tensor, weights: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """dout (T, H) -> dy (P, H), dweights (T, k) fp32; zeros for a place or a pair that nothing came from."""
    dy, dweights = torch.zeros_like(y), torch.zeros_like(weights)
    for j in range(slots.shape[1]):
        tokens, rows = _taken(y, slots[:, j])
        wide = dout[tokens].float()
        dy[slots[tokens, j]] = (weights[tokens, j].unsqueeze(1) * wide).to(y.dtype)
        dweights[tokens, j] = tree_sum(wide * rows)
    return dy, dweights


def _taken(y: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that have a place in slots (T,), and its rows, fp32."""
    tokens = (slots >= 0).nonzero().squeeze(1)
    return tokens, y.index_select(0, slots[tokens]).float()
