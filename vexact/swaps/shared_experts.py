"""Mixtures of experts that add what experts for all tokens give: in one sum, rounded once, as our decoder does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vexact.ops.hf import experts_forward
from vexact.swaps.classes import before, stand_in

PARTS = {"gate", "experts", "shared_experts"}
_SHAPE = 2, 5, 8  # of a trial


class SharedExperts(nn.Module):
    """``experts(x) + shared_experts(x)`` for hidden states (B, T, H)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        _, weights, experts = layer.gate(hidden_states)
        x = hidden_states.flatten(0, -2)
        out = experts_forward(layer.experts, x, experts, weights, shared=layer.shared_experts(x))
        return out.view_as(hidden_states)


@torch.no_grad()
def shared_experts_class(module: nn.Module) -> type | None:
    """What to make of such a layer; None for a module that computes something else."""
    if set(module._modules) != PARTS or module._parameters or module._buffers:
        return None
    x = torch.arange(float(torch.Size(_SHAPE).numel())).view(_SHAPE)
    twin = stand_in(module, {}, {"gate": _Gate(), "experts": _Experts(), "shared_experts": _Shared()})
    try:
        theirs = twin(x)
    except Exception:  # of any class: its parts are no such layers
        return None
    flat = x.flatten(0, 1)
    ours = _Experts()(flat, *_Gate()(flat)[:0:-1]) + _Shared()(flat)
    same = isinstance(theirs, Tensor) and torch.equal(theirs, ours.view_as(x))
    return before(SharedExperts, type(module)) if same else None


class _Gate(nn.Module):
    """Stands for a router in a trial."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = x.reshape(-1, x.shape[-1])[:, :2]
        return first, first + 1, first.long() % 3


class _Experts(nn.Module):
    """Any function of what experts are given."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return x * weights.sum(1, keepdim=True) + experts[:, :1] - 2 * experts[:, 1:]


class _Shared(nn.Module):
    """Another."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 - x * x
