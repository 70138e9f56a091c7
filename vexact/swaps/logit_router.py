"""Routers that give logits, of whose scores the block around them chooses: GLM and DeepSeek-V3 in older releases of
transformers, and in packages that were made from those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vexact.ops import route
from vexact.swaps.classes import before, stand_in
from vexact.swaps.router import Router, settings
from vexact.swaps.shared_experts import PARTS, SharedExperts

_TOKENS = 32  # of a trial
_FROM_BLOCK = {  # what a router that chooses by itself knows, and what the block calls it
    "top_k": "top_k",
    "num_experts": "n_routed_experts",
    "num_group": "n_group",
    "topk_group": "topk_group",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}


@torch.no_grad()
def choose_in_router(block: nn.Module) -> Callable[[], None] | None:
    """Makes the block's router one that chooses experts and weighs them, and the block one that takes its choice.

    Returns:
        How to go back; None for a module that is no such block.

    Raises:
        ValueError: it is one, but scores, chooses or weighs in another way.
    """
    if not _is_choosing(block):
        return None
    router: Any = block.gate
    known = {name: getattr(block, of_block) for name, of_block in _FROM_BLOCK.items()}
    known["hidden_dim"] = router.weight.shape[1]
    try:
        same = _same_logits(router) and _same_choice(block, known)
    except Exception:  # of any class: its parts are called in another way
        return None
    if not same:
        raise ValueError("it scores, chooses or weighs experts in a way that is not known")
    classes = type(block), type(router)
    added = known.keys() - vars(router).keys()
    vars(router).update({name: known[name] for name in added})
    router.__class__ = before(Router, classes[1])
    block.__class__ = before(SharedExperts, classes[0])

    def back() -> None:
        block.__class__, router.__class__ = classes
        for name in added:
            del vars(router)[name]

    return back


def _is_choosing(block: nn.Module) -> bool:
    if set(block._modules) != PARTS or not hasattr(block, "route_tokens_to_experts"):
        return False
    router = block._modules["gate"]
    assert router is not None
    parts = set(router._parameters), set(router._buffers), set(router._modules)
    return parts == ({"weight"}, {"e_score_correction_bias"}, set()) and all(
        hasattr(block, name) for name in _FROM_BLOCK.values()
    )


def _same_logits(router: Any) -> bool:
    x, weight = _random(_TOKENS, router.weight.shape[1]), _random(*router.weight.shape)
    twin = stand_in(router, {"weight": nn.Parameter(weight)}, {})
    return torch.allclose(twin(x), x @ weight.T, rtol=1e-4, atol=1e-4 * weight.shape[1] ** 0.5)


def _same_choice(block: nn.Module, known: dict[str, Any]) -> bool:
    """The block with other parts, which tell experts and weights apart but not their order."""
    x = _random(2, _TOKENS, known["num_experts"])
    gate = _Logits(known, _random(known["num_experts"]) * 0.1)
    theirs = stand_in(block, {}, {"gate": gate, "experts": _Experts(), "shared_experts": _Shared()})(x)
    _, weights, experts = gate.chosen(x)
    ours = _Experts()(x.flatten(0, 1), experts, weights).view_as(x) + _Shared()(x)
    return isinstance(theirs, Tensor) and torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


class _Logits(nn.Module):
    """Gives its tokens for logits, and says what a router of ours makes of them."""

    def __init__(self, known: dict[str, Any], bias: Tensor) -> None:
        super().__init__()
        self.e_score_correction_bias = bias
        vars(self).update(known)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router: Any = self
        logits = self(x)
        routes = route(logits, router.e_score_correction_bias, top_k=router.top_k, **settings(router))
        return logits, routes.weights, routes.experts.long()


class _Experts(nn.Module):
    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        return x * (weights * (experts + 1).sqrt()).sum(1, keepdim=True)


class _Shared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 - x * x
