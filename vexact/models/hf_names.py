"""Between our fused parameter names and those of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from vexact.models.config import ModelConfig

_RENAMED = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "attention": "self_attn",
}


def hf_sources(config: ModelConfig, name: str) -> tuple[list[str], list[int]]:
    """The Hugging Face tensors that make up parameter ``name`` along axis 0, and their sizes ([-1] when it is one)."""
    if name == "lm_head.weight":
        return [name], [-1]
    hf = "model." + ".".join(_RENAMED.get(part, part) for part in name.split("."))
    for fused, parts, sizes in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), list(config.qkv_sizes)),
        ("gate_up_proj", ("gate_proj", "up_proj"), [config.intermediate_size] * 2),
    ):
        if f".{fused}." in hf:
            return [hf.replace(fused, part) for part in parts], sizes
    return [hf], [-1]


def to_hf(config: ModelConfig, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Splits fused parameters and renames; the tensors are views."""
    for name, tensor in named:
        sources, sizes = hf_sources(config, name)
        parts = [tensor] if len(sources) == 1 else tensor.split(sizes, dim=0)
        yield from zip(sources, parts, strict=True)
