"""Routers of mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vexact.ops import linear, route
from vexact.swaps.classes import before, stand_in

_TOKENS, _WIDTH = 64, 8  # of a trial


class Router(nn.Module):
    """Logits (T, E) in fp32, never rounded; weights (T, k) fp32 and experts (T, k) int64, in the order of the index.

    What a router computes is read from the attributes that transformers gives it: a correction bias means sigmoid
    scores and groups by their two best (DeepSeek-V3), a ``topk_method`` softmax scores and groups by their best
    (DeepSeek-V2), neither of them plain softmax (Qwen-MoE; Mixtral, which always normalises).
    """

    rounds = False  # weights to the dtype of the hidden states

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router: Any = self
        x, weight = hidden_states.reshape(-1, router.weight.shape[1]), router.weight
        if x.dtype != weight.dtype:
            x, weight = x.float(), weight.float()
        logits = linear(x, weight, out_dtype=torch.float32)
        bias = getattr(router, "e_score_correction_bias", None)
        bias = None if bias is None else bias.float()
        round_to = hidden_states.dtype if self.rounds else torch.float32
        routes = route(logits, bias, top_k=router.top_k, round_to=round_to, **settings(router))
        return logits, routes.weights, routes.experts.long()


class RoundingRouter(Router):
    rounds = True


def settings(router: Any) -> dict[str, Any]:
    """Keywords of ``route`` beside ``top_k`` and ``round_to``."""
    groups = {"num_groups": getattr(router, "num_group", 1), "top_groups": getattr(router, "topk_group", 1)}
    scale = getattr(router, "routed_scaling_factor", 1.0)
    if hasattr(router, "e_score_correction_bias"):
        return {"scoring": "sigmoid", "normalize": router.norm_topk_prob, "scale": scale, **groups}
    if hasattr(router, "topk_method"):
        limited = router.topk_method == "group_limited_greedy"
        return {"normalize": False, "scale": scale, **(groups if limited else {})}
    return {"normalize": getattr(router, "norm_topk_prob", True)}


def round_routers(model: nn.Module) -> None:
    """Gives the routers' weights the dtype of the embedding, as this package's decoder holds them. transformers leaves
    DeepSeek's in fp32 whatever the model's dtype is; a correction bias stays so here too."""
    for module in model.modules():
        if looks_like_router(module):
            router: Any = module
            router.weight.data = router.weight.data.to(next(model.parameters()).dtype)


def looks_like_router(module: nn.Module) -> bool:
    known = {"weight"} == set(module._parameters) and set(module._buffers) <= {"e_score_correction_bias"}
    return known and all(hasattr(module, name) for name in ("top_k", "num_experts", "hidden_dim"))


@torch.no_grad()
def router_class(module: nn.Module) -> type | None:
    """What to make of a router; None for a module that computes something else.

    Raises:
        ValueError: it looks like one but chooses or weighs in another way.
    """
    if not looks_like_router(module):
        return None
    try:
        rounds = _tried(module, torch.bfloat16)[1].dtype == torch.bfloat16
        logits, weights, experts = _tried(module, torch.float32)
    except Exception:  # of any class: it is not a layer of one tensor, or returns something else
        return None
    swap = before(RoundingRouter if rounds else Router, type(module))
    ours = _tried(module, torch.float32, swap)
    experts, order = experts.sort(1)
    same = torch.equal(experts, ours[2]) and torch.allclose(weights.gather(1, order), ours[1], rtol=1e-4, atol=1e-6)
    if not (same and torch.allclose(logits, ours[0], rtol=1e-4, atol=1e-5)):
        raise ValueError("it chooses or weighs experts in a way that is not known")
    return swap


def _tried(module: nn.Module, dtype: torch.dtype, swap: type | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What it makes of random tokens of a small width, on the CPU."""
    router: Any = module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(router.num_experts, _WIDTH).to(dtype))
        x = torch.randn(_TOKENS, _WIDTH).to(dtype)
        bias = torch.randn(router.num_experts) * 0.1
    twin: Any = stand_in(module, {"weight": weight}, {})
    twin.__dict__ |= {"_buffers": dict.fromkeys(module._buffers, bias), "hidden_dim": _WIDTH}
    if swap is not None:
        twin.__class__ = swap
    logits, weights, experts = twin(x)
    return logits, weights, experts
