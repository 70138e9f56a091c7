"""VeOmni's slot for the experts of a layer, and what else of VeOmni touches routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from veomni.lora.moe_layers import is_lora_moe_experts
from veomni.utils.moe_monitor import ROUTER_EXTRACTORS, register_router_extractor
from veomni.utils.moe_router_replay import get_active_replay

from vexact.ops.hf import experts_forward
from vexact.swaps.router import Router
from vexact_veomni.parallel import refuse_expert_parallelism

_BIAS = "e_score_correction_bias"


def moe_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """(T, H) of (T, H) hidden states and (T, k) experts and weights, on the experts' module that VeOmni hands over.

    Raises:
        ValueError: expert parallelism, or routes that are replayed.
    """
    refuse_expert_parallelism()
    if get_active_replay() is not None:
        raise ValueError(
            "a router replay is active, which weighs experts by torch's softmax; exact routes are those of the rollout "
            "without it: set_active_replay(None)"
        )
    return experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def keep_biases(model: nn.Module) -> None:
    """Makes room for fp32 correction biases before weights are loaded: VeOmni rounds a tensor to the dtype it finds."""
    for module, bias in _biases(model):
        module._buffers[_BIAS] = bias.float()


def experts_left(model: nn.Module) -> list[str]:
    """What our operators would not compute: adapters on experts, and what a rounded correction bias would choose."""
    adapted = [name for name, module in model.named_modules() if is_lora_moe_experts(module)][:1]
    rounded = [bias.dtype for _, bias in _biases(model) if bias.dtype != torch.float32][:1]
    fix = "call convert before weights are loaded, or build the model in float32"
    return [
        *(f"{name} has adapters on its experts, which our operators do not compute" for name in adapted),
        *(f"the {_BIAS} of its routers is {dtype} and has lost bits; {fix}" for dtype in rounded),
    ]


def _biases(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    return ((module, bias) for module in model.modules() if (bias := module._buffers.get(_BIAS)) is not None)


def without_balance_loss(model: Any) -> dict[str, bool]:
    """What a forward is given that asks for log-probabilities: VeOmni cannot add the load-balancing loss to none."""
    return {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}


def show_to_monitor(model: nn.Module) -> None:
    """Tells VeOmni's monitor of expert loads where our routers, which it knows by class, give their choice."""
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, Router) and kind not in ROUTER_EXTRACTORS:
            register_router_extractor(kind)(lambda out: out[2])
