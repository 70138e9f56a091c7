"""RMS norms: which of three roundings a module has is found by what it computes, not by its name."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from vexact.ops import rms_norm
from vexact.swaps.classes import before, stand_in

_MOST_DIFFERENT = 0.01  # of bf16 results; another order of the sum moves fewer, another rounding many more


def _eps(module: nn.Module, dtype: torch.dtype) -> float:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return torch.finfo(dtype).eps if eps is None else float(eps)  # None is torch.nn.RMSNorm's spelling of that


class _RMSNorm(nn.Module):
    weight: Tensor | None

    def _weight(self, x: Tensor) -> Tensor:
        return x.new_ones(x.shape[-1]) if self.weight is None else self.weight


class RoundThenScale(_RMSNorm):
    """``weight * normalised.to(dtype)``: Llama, Qwen, Mistral."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight(x), _eps(self, x.dtype))


class ScaleThenRound(_RMSNorm):
    """``(weight * normalised).to(dtype)``: OLMo 2, torch.nn.RMSNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self._weight(x).float(), _eps(self, x.dtype)).to(x.dtype)


class OnePlusWeight(_RMSNorm):
    """``((1 + weight) * normalised).to(dtype)``: Gemma."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), 1.0 + self._weight(x).float(), _eps(self, x.dtype)).to(x.dtype)


def norm_class(module: nn.Module) -> type | None:
    """What to make of an RMS norm; None for a module that computes something else."""
    names = set(module._parameters)
    weight = module._parameters.get("weight")
    if (
        module._modules
        or not names <= {"weight"}
        or not (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))
    ):
        return None
    if weight is not None and weight.dim() != 1:
        return None
    key = type(module), 0 if weight is None else len(weight), _eps(module, torch.bfloat16)
    if key not in _found:
        _found[key] = _find(module, key[1])
    return _found[key]


_found: dict[tuple[type, int, float], type | None] = {}


def _find(module: nn.Module, width: int) -> type | None:
    shares = {swap: _share_different(module, swap, width) for swap in (RoundThenScale, ScaleThenRound, OnePlusWeight)}
    best = min(shares, key=lambda swap: shares[swap])
    return before(best, type(module)) if shares[best] <= _MOST_DIFFERENT else None


@torch.no_grad()
def _share_different(module: nn.Module, swap: type, width: int) -> float:
    """Share of results in bf16 that are not those of ``module``; 1 if they are far from it in fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (tensor.to(dtype) for tensor in _trial(width))
        twin = stand_in(module, {"weight": nn.Parameter(weight)} if width else {"weight": None}, {})  # type: ignore[dict-item]
        try:
            theirs = twin(x)
        except Exception:  # of any class: it is not a norm of one tensor
            return 1.0
        twin.__class__ = before(swap, type(module))
        ours = twin(x)
        if not isinstance(theirs, Tensor) or theirs.dtype != dtype or theirs.shape != x.shape:
            return 1.0
        if dtype == torch.float32 and not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            return 1.0
    return float((ours != theirs).float().mean())


@cache
def _trial(width: int) -> tuple[Tensor, Tensor]:
    """Rows so small that eps decides, up to large ones; and a weight."""
    generator = torch.Generator().manual_seed(0)
    columns = width or 64
    rows = torch.randn(64, columns, generator=generator) * torch.logspace(-4, 2, 64)[:, None]
    return rows, torch.rand(columns, generator=generator) + 0.5
