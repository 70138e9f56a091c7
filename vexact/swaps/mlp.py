"""Gated SiLU feed-forward layers, and activations that stand alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vexact.ops import swiglu
from vexact.swaps.classes import before, stand_in


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of two tensors (..., I)."""
    return _swiglu(torch.cat((gate, up), dim=-1))


def _swiglu(gate_up: Tensor) -> Tensor:
    return swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)


class GatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class FusedGatedMLP(nn.Module):
    """The same with gate and up side by side in ``gate_up_proj``."""

    gate_up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_swiglu(self.gate_up_proj(x)))


_SHAPES = {  # children besides the activation: the class, and the widths (in, out) of a trial
    frozenset({"gate_proj", "up_proj", "down_proj"}): (
        GatedMLP,
        {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)},
    ),
    frozenset({"gate_up_proj", "down_proj"}): (FusedGatedMLP, {"gate_up_proj": (8, 24), "down_proj": (12, 8)}),
}


@torch.no_grad()
def mlp_class(module: nn.Module) -> type | None:
    """What to make of a gated SiLU layer; None for a module that computes something else."""
    linear = frozenset(name for name, child in module._modules.items() if isinstance(child, nn.Linear))
    rest = [child for name, child in module._modules.items() if name not in linear]
    if linear not in _SHAPES or module._parameters or any(next(iter(m.parameters()), None) is not None for m in rest):  # type: ignore[union-attr]
        return None
    key = type(module), linear, tuple(map(type, rest))
    if key not in _found:
        _found[key] = _find(module, linear)
    return _found[key]


_found: dict[object, type | None] = {}


def _find(module: nn.Module, linear: frozenset[str]) -> type | None:
    swap, widths = _SHAPES[linear]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = {name: nn.Linear(*widths[name], bias=False, dtype=torch.float32, device="cpu") for name in linear}
        x = torch.randn(5, 8) * 4
    twin = stand_in(module, {}, {name: small.get(name, child) for name, child in module._modules.items()})  # type: ignore[misc]
    try:
        theirs = twin(x)
    except Exception:  # of any class: it is not a layer of one tensor
        return None
    twin.__class__ = before(swap, type(module))
    return before(swap, type(module)) if torch.allclose(twin(x), theirs, rtol=1e-5, atol=1e-6) else None


class Activation(nn.Module):
    """An elementwise activation of transformers or torch.

    On the CPU torch computes whole vectors with one function and what is left over at the end of a thread's share with
    another. Every second element of a buffer is no vector: each one is then computed alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            spread = x.new_empty(*x.shape, 2)
            x = spread.select(-1, 0).copy_(x)
        return super().forward(x)


def activation_class(module: nn.Module) -> type | None:
    """What to make of an activation without parameters; None for another module."""
    from transformers.activations import ACT2CLS

    known = {one[0] if isinstance(one, tuple) else one for one in ACT2CLS.values()} | {nn.GELU, nn.SiLU}
    has_any = module._modules or module._parameters
    return before(Activation, type(module)) if type(module) in known and not has_any else None
