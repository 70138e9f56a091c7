"""Which experts a model chooses while it runs, ours or transformers': seen at its routers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vexact.models.layers.moe import Router
from vexact.ops.moe.digest import digest_of
from vexact.swaps.router import looks_like_router


class RouteTap:
    """Sees every forward of a model; ``digests`` are those of the last one, ``loads`` of all since ``forget``."""

    def __init__(self, model: nn.Module) -> None:
        """``model``: a :class:`vexact.models.CausalLM`, or a causal language model of transformers."""
        self._digests: Tensor | None = None
        self._loads: dict[int, Tensor] = {}
        routers = {name: module for name, module in model.named_modules() if _is_router(module)}
        if routers:
            getattr(model, "base_model", model).register_forward_pre_hook(self._begin)
        for name, module in routers.items():
            module.register_forward_hook(partial(self._see, layer_of(name)))

    @property
    def digests(self) -> Tensor | None:
        """(T,) int64, as ``Sample.route_digests``; None without experts."""
        return self._digests

    @property
    def loads(self) -> dict[int, Tensor]:
        """By layer, (E,) int64: how many tokens each expert had."""
        return self._loads

    def forget(self) -> None:
        """Counts loads from here on."""
        self._loads = {}

    def _begin(self, *_: Any) -> None:
        self._digests = None

    def _see(self, layer: int, module: Any, _args: Any, out: Any) -> None:
        experts = out[0].experts if isinstance(module, Router) else out[-1]
        experts = experts.detach().reshape(-1, experts.shape[-1]).sort(dim=1).values  # (T, k)
        digest = digest_of(experts, layer)
        self._digests = digest if self._digests is None else self._digests + digest
        count = torch.bincount(experts.flatten().long(), minlength=module.weight.shape[0])
        self._loads[layer] = self._loads.get(layer, 0) + count


def _is_router(module: nn.Module) -> bool:
    return isinstance(module, Router) or looks_like_router(module)


def layer_of(name: str) -> int:
    """
    >>> layer_of("model.layers.12.mlp.gate")
    12
    """
    return int(name.partition("layers.")[2].partition(".")[0])
