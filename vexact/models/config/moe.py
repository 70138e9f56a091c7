"""Mixture of experts: how tokens choose experts, and which layers have them, by architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vexact.models.config.fields import Fields

_MOST_EXPERTS, _MOST_WIDTH, _MOST_SHARED = 1 << 14, 1 << 20, 1 << 10

_QWEN = frozenset((
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers",
))  # fmt: skip
_MIXTRAL = frozenset(("num_experts", "num_local_experts", "num_experts_per_tok"))
_DEEPSEEK = frozenset((
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "norm_topk_prob", "n_group",
    "topk_group", "topk_method", "scoring_func", "routed_scaling_factor", "first_k_dense_replace", "moe_layer_freq",
))  # fmt: skip
_METHODS = {True: ("noaux_tc",), False: ("greedy", "group_limited_greedy")}  # of version 3, and of 2
MOE_KEYS = {
    "Qwen3MoeForCausalLM": _QWEN,
    "MixtralForCausalLM": _MIXTRAL,
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
}


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """A feed-forward of experts. Scores are those of all experts; a token's ``top_k`` are the best by score + bias."""

    num_experts: int  # E
    top_k: int
    intermediate_size: int  # of one expert
    layers: frozenset[int]  # which have experts; the others are dense
    scoring: str = "softmax"  # or "sigmoid"
    normalize: bool = True  # weights are divided by their sum
    scale: float = 1.0  # and multiplied by this
    round_weights: bool = False  # to the model's dtype; else they stay fp32
    num_groups: int = 1  # equal groups of experts
    top_groups: int = 1  # a token's experts are in this many of them
    correction_bias: bool = False  # added to scores for the choice alone
    shared_intermediate_size: int = 0  # of the MLP that every token goes through; 0 for none


def read_moe(config: Fields, architecture: str, num_layers: int) -> MoeConfig | None:
    """
    Raises:
        ValueError: a value out of range, or keys that do not fit together; None for a dense architecture.
    """
    if architecture == "Qwen3MoeForCausalLM":
        return _qwen(config, num_layers)
    if architecture == "MixtralForCausalLM":
        num_experts, top_k = _experts(config, "num_local_experts")
        width = config.size("intermediate_size", _MOST_WIDTH)
        return MoeConfig(num_experts, top_k, width, frozenset(range(num_layers)))
    if architecture in MOE_KEYS:
        return _deepseek(config, num_layers, v3=architecture == "DeepseekV3ForCausalLM")
    return None


def _qwen(config: Fields, num_layers: int) -> MoeConfig:
    num_experts, top_k = _experts(config)
    step = config.size("decoder_sparse_step", 1 << 12, 1)
    dense = _layer_list(config, "mlp_only_layers", num_layers)
    layers = frozenset(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    return MoeConfig(
        num_experts,
        top_k,
        config.size("moe_intermediate_size", _MOST_WIDTH),
        layers,
        normalize=config.flag("norm_topk_prob", False),
        round_weights=True,
    )


def _deepseek(config: Fields, num_layers: int, v3: bool) -> MoeConfig:
    num_experts, top_k = _experts(config, "n_routed_experts")
    config.choice("scoring_func", ("sigmoid",) if v3 else ("softmax",), "sigmoid" if v3 else "softmax")
    method = config.choice("topk_method", _METHODS[v3], _METHODS[v3][0])
    normalize = config.flag("norm_topk_prob", v3)
    if normalize and not v3:
        config.refuse(
            "norm_topk_prob", "is read in several ways for DeepSeek-V2, and no released model has it; use false"
        )
    num_groups, top_groups = (1, 1) if method == "greedy" else _groups(config, num_experts, top_k, pairs=v3)
    width = config.size("moe_intermediate_size", _MOST_WIDTH)
    shared = 0 if config.values.get("n_shared_experts", ...) is None else config.count("n_shared_experts", _MOST_SHARED)
    first, every = config.count("first_k_dense_replace", num_layers), config.size("moe_layer_freq", 1 << 12, 1)
    return MoeConfig(
        num_experts,
        top_k,
        width,
        frozenset(layer for layer in range(first, num_layers) if layer % every == 0),
        scoring="sigmoid" if v3 else "softmax",
        normalize=normalize,
        scale=config.number("routed_scaling_factor", 1e-6, 1e6),
        num_groups=num_groups,
        top_groups=top_groups,
        correction_bias=v3,
        shared_intermediate_size=shared * width,
    )


def _experts(config: Fields, usual: str = "num_experts") -> tuple[int, int]:
    """How many there are, under any of the names for it, and how many a token chooses."""
    names = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config]
    key = names[0] if names else usual
    num_experts = config.size(key, _MOST_EXPERTS)
    for other in names[1:]:
        if config.values[other] != num_experts:
            config.refuse(other, f"contradicts {key}={num_experts}; only one can be meant")
    return num_experts, config.size("num_experts_per_tok", num_experts)


def _groups(config: Fields, num_experts: int, top_k: int, pairs: bool) -> tuple[int, int]:
    """
    Args:
        pairs: a group's score is the sum of its two best.
    """
    num_groups = _group_count(config, "n_group", num_experts, 8 if pairs else 1)
    top_groups = _group_count(config, "topk_group", num_groups, 4 if pairs else 1)
    if num_experts % num_groups or (pairs and num_groups > 1 and num_experts // num_groups < 2):
        least = " of two or more" if pairs else ""
        config.refuse("n_group", f"must divide the {num_experts} experts into equal groups{least}")
    if top_k > top_groups * (num_experts // num_groups):
        config.refuse(
            "num_experts_per_tok",
            f"is more than the experts of topk_group={top_groups} groups, {top_groups * (num_experts // num_groups)}",
        )
    return num_groups, top_groups


def _group_count(config: Fields, key: str, most: int, usual: int) -> int:
    """A file that is silent means what transformers then takes, ``usual``; null means that there are no groups."""
    return 1 if key in config and config.values[key] is None else config.size(key, most, usual)


def _layer_list(config: Fields, key: str, num_layers: int) -> frozenset[int]:
    value = config.values.get(key)
    layers = [] if value is None else value
    if not isinstance(layers, list) or not all(_is_layer(layer, num_layers) for layer in layers):
        config.refuse(key, f"must be a list of layers, whole numbers from 0 to {num_layers - 1}")
    return frozenset(layers)


def _is_layer(value: Any, num_layers: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < num_layers
