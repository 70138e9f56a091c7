"""Between our fused parameter names and those of Hugging Face checkpoints."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from torch import Tensor

from vexact.models.config import ModelConfig

_RENAMED = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "q_a_norm": "q_a_layernorm",
    "kv_a_norm": "kv_a_layernorm",
    "shared": "shared_experts",
}
_ROUTER = {"router.weight": "gate.weight", "router.bias": "gate.e_score_correction_bias"}
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_MIXTRAL_PARTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_EXPERTS = ".mlp.experts."


def hf_sources(config: ModelConfig, name: str) -> tuple[list[str], list[int]]:
    """The Hugging Face tensors that make up parameter ``name`` along axis 0, and their sizes ([-1] when it is one).

    The weights of E experts count as one matrix, those of one expert under those of another: see :func:`matrix`.
    """
    if name == "lm_head.weight":
        return [name], [-1]
    if is_experts(name):
        return _expert_sources(config, name)
    hf = _renamed(config, name)
    for fused, parts, sizes in _fusions(config, name):
        if f".{fused}." in hf:
            return [hf.replace(fused, part) for part in parts], sizes
    return [hf], [-1]


def stored_sources(config: ModelConfig, name: str, held: Container[str]) -> list[str]:
    """``hf_sources`` by the names that a checkpoint uses, which may be those of a saved transformers module.

    There, the experts of a layer are one tensor laid out as ours, (E, 2I, H) and (E, H, I), and Mixtral's feed-forward
    is an ``mlp``.

    Args:
        held: the tensors of the checkpoint.
    """
    sources = hf_sources(config, name)[0]
    for other in (_plain(name), _renamed(config, name)):
        if (is_experts(name) or ".router." in name) and other in held and sources[0] not in held:
            return [other]
    return sources


def matrix(tensor: Tensor) -> Tensor:
    """The experts' weights (E, N, K) as (E * N, K); any other tensor as it is."""
    return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor


def is_experts(name: str) -> bool:
    """Whether a parameter holds the weights of all experts of a layer."""
    return _EXPERTS in name


def to_hf(config: ModelConfig, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Splits fused parameters and renames; the tensors are views."""
    for name, tensor in named:
        sources, sizes = hf_sources(config, name)
        parts = [tensor] if sizes == [-1] else matrix(tensor).split(sizes, dim=0)
        yield from zip(sources, parts, strict=True)


def to_module(config: ModelConfig, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same under the names of a transformers module, which has the experts of a layer in one tensor as we do."""
    for name, tensor in named:
        if is_experts(name) or ".router." in name:
            yield _plain(name), tensor
        else:
            yield from to_hf(config, [(name, tensor)])


def _fusions(config: ModelConfig, name: str) -> Iterator[tuple[str, tuple[str, ...], list[int]]]:
    """A fused projection, its parts and their sizes."""
    yield "qkv_proj", ("q_proj", "k_proj", "v_proj"), list(config.qkv_sizes)
    if config.mla is not None:
        rank, shared = config.mla.q_rank, config.mla.kv_rank + config.mla.rope_dim
        first = ("q_proj", config.qkv_sizes[0]) if rank is None else ("q_a_proj", rank)
        yield "qkv_a_proj", (first[0], "kv_a_proj_with_mqa"), [first[1], shared]
    shared_experts = config.moe is not None and ".shared." in name
    width = config.moe.shared_intermediate_size if config.moe and shared_experts else config.intermediate_size
    yield "gate_up_proj", ("gate_proj", "up_proj"), [width] * 2


def _expert_sources(config: ModelConfig, name: str) -> tuple[list[str], list[int]]:
    assert config.moe is not None
    before, kind = _renamed(config, name).split(".experts.")
    parts = (_MIXTRAL_PARTS if _is_mixtral(config) else _EXPERT_PARTS)[kind]
    size = config.hidden_size if kind == "down_proj" else config.moe.intermediate_size
    sources = [f"{before}.experts.{i}.{part}.weight" for i in range(config.moe.num_experts) for part in parts]
    return sources, [size] * len(sources)


def _renamed(config: ModelConfig, name: str) -> str:
    hf = _plain(name)
    return hf.replace(".mlp.", ".block_sparse_moe.") if _is_mixtral(config) else hf


def _plain(name: str) -> str:
    """Under the name that a transformers module has for it."""
    for ours, theirs in _ROUTER.items():
        name = name.replace(ours, theirs)
    return "model." + ".".join(_RENAMED.get(part, part) for part in name.split("."))


def _is_mixtral(config: ModelConfig) -> bool:
    return config.architecture == "MixtralForCausalLM"
