"""The experts that transformers calls as ``triton-invariant``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vexact.ops.hf.attention import NAME
from vexact.ops.moe import combine, group_tokens, grouped_linear
from vexact.ops.swiglu import swiglu

_LAYOUT = {  # what transformers' decorator notes on a module, and what it has to be
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    shared: Tensor | None = None,
) -> Tensor:
    """Gated SiLU experts of a transformers model.

    A token's experts are added in the order of their index, whatever the order of the router's choice, in fp32 and
    with one rounding.

    Args:
        hidden_states: (T, H). top_k_index: (T, k) integers, distinct. top_k_weights: (T, k).
        shared: (T, H), added before the rounding.

    Returns:
        (T, H) in the dtype of ``hidden_states``.

    Raises:
        ValueError: experts of another form: with biases, transposed or interleaved weights, another activation.
    """
    layer: Any = module
    _refuse_other_forms(layer)
    index, order = top_k_index.sort(dim=1)
    weights = top_k_weights.gather(1, order).float()
    away = index >= layer.num_experts  # on another rank of expert parallelism
    groups = group_tokens(torch.where(away, -1, index).to(torch.int32), layer.num_experts)
    inner = swiglu(grouped_linear(hidden_states, layer.gate_up_proj, groups, gather=True))
    return combine(grouped_linear(inner, layer.down_proj, groups, gather=False), weights, groups, shared)


def _refuse_other_forms(layer: Any) -> None:
    from transformers.activations import SiLUActivation
    from transformers.integrations import moe

    kind = type(layer).__name__
    for name, expected in _LAYOUT.items():
        if getattr(layer, name, expected) != expected:
            raise ValueError(f"{NAME}: {kind} has {name}={not expected}, which is not supported; use experts 'eager'")
    if not isinstance(layer.act_fn, (nn.SiLU, SiLUActivation)):
        raise ValueError(f"{NAME}: {kind} has {type(layer.act_fn).__name__}; only SiLU experts are supported")
    if getattr(type(layer), "_apply_gate", moe._default_apply_gate) is not moe._default_apply_gate:
        raise ValueError(f"{NAME}: {kind} has a gate of its own (_apply_gate), which is not supported")
    if getattr(layer, "limit", None) is not None:
        raise ValueError(f"{NAME}: {kind} clamps gate and up to {layer.limit:g}, which is not supported")
