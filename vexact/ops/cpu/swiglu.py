"""CPU twin of swiglu."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """(M, 2I) -> (M, I)."""
    gate, up = _halves(gate_up)
    return (gate * _sigmoid(gate) * up).to(gate_up.dtype)


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """dgate = dy * up * s * (1 + g * (1 - s)), dup = dy * g * s, with s = sigmoid(g)."""
    gate, up = _halves(gate_up)
    wide, sig = dy.float(), _sigmoid(gate)
    dgate = wide * up * sig * (1.0 + gate * (1.0 - sig))
    return torch.cat((dgate, wide * gate * sig), dim=-1).to(gate_up.dtype)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gate.contiguous(), up


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))
