"""Model configuration: what a Hugging Face ``config.json`` says, checked and flattened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vexact.models.checkpoint.files import UNFINISHED, checkpoint_directory, is_there, read_json
from vexact.models.checkpoint.reader import refuse_other_kinds
from vexact.models.config.fields import Fields
from vexact.models.config.mla import MLA_KEYS, MlaConfig, read_mla
from vexact.models.config.moe import MOE_KEYS, MoeConfig, read_moe
from vexact.models.config.refusals import QK_NORM, refuse_quantised, refuse_unsupported
from vexact.models.config.rope import DEFAULT_THETA, MOST_POSITIONS, RopeConfig, read_rope

# Architecture to the model_type that belongs to it
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
# What transformers takes where config.json is silent, if not what it takes for most: positions, epsilon and theta
_MOST = (32768, 1e-6, DEFAULT_THETA)
_DEFAULTS = {
    "LlamaForCausalLM": (2048, 1e-6, DEFAULT_THETA),
    "MixtralForCausalLM": (131072, 1e-5, 1e6),
    "DeepseekV2ForCausalLM": (2048, 1e-6, DEFAULT_THETA),
    "DeepseekV3ForCausalLM": (4096, 1e-6, DEFAULT_THETA),
}
_LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_NEXT_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers")  # released name, and that of transformers 5

# Far beyond any model; more is a typing error, and would only fill the memory
_MOST_WIDTH, _MOST_LAYERS, _MOST_HEADS, _MOST_TOKENS = 1 << 20, 1 << 12, 1 << 12, 1 << 24


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the decoder needs. ``raw`` is the original dictionary, written back unchanged on save."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of a query and a key
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    padding_idx: int | None  # the row of the embedding that no token trains
    moe: MoeConfig | None  # None for a dense model
    mla: MlaConfig | None  # None for attention with projected keys and values
    extra_layers: int  # behind the last one, for the prediction of later tokens; a checkpoint's are left out
    raw: dict[str, Any]

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Widths of a token's queries, keys and values, all heads side by side."""
        return self.num_heads * self.key_dim, self.num_kv_heads * self.key_dim, self.num_kv_heads * self.value_dim

    @property
    def key_dim(self) -> int:
        """Width of one head's query, key and cached key."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's value, also in the cache."""
        return self.head_dim if self.mla is None else self.mla.value_dim

    @property
    def rope_dim(self) -> int:
        """How many numbers of a query and a key are rotated."""
        return self.head_dim if self.mla is None else self.mla.rope_dim

    @property
    def softmax_scale(self) -> float:
        """What dot products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.mla is None else self.mla.softmax_scale

    @property
    def chooses_experts(self) -> bool:
        """Whether there is a layer with experts: an architecture that has them may be dense in all of its layers."""
        return self.moe is not None and bool(self.moe.layers)

    @property
    def described(self) -> str:
        """The architecture, as a subject of "has no experts"."""
        return self.architecture if self.moe is None else f"{self.architecture} with this config.json"

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of a layer is a mixture of experts."""
        return self.moe is not None and layer in self.moe.layers

    @classmethod
    def from_hf_dir(cls, path: str | Path) -> ModelConfig:
        """Reads ``config.json`` (and ``generation_config.json`` for stop tokens).

        Raises:
            FileNotFoundError, NotADirectoryError, PermissionError: no such directory, or a file missing or closed.
            ValueError: a damaged file, a value out of range, or an unsupported feature; file, key and value are named.
        """
        directory = checkpoint_directory(path)
        refuse_other_kinds(directory)
        file, generation = directory / "config.json", directory / "generation_config.json"
        if not is_there(file):
            raise FileNotFoundError(f"model directory {directory} has no config.json; {_remedy(directory)}")
        raw = read_json(file)
        stop = Fields(read_json(generation), str(generation)) if is_there(generation) else None
        refuse_quantised(Fields(raw, str(file)))
        return _interpret(raw, str(file), stop)

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any], eos_token_id: int | list[int] | None = None) -> ModelConfig:
        """Interprets a Hugging Face configuration; ``eos_token_id`` overrides the one in it. Raises ValueError."""
        return _interpret(dict(raw), "config.json", Fields({"eos_token_id": eos_token_id}, "argument"))


def _interpret(raw: dict[str, Any], file: str, stop: Fields | None) -> ModelConfig:
    config = Fields(raw, file)
    architecture = _architecture(config)
    vocab_size = config.size("vocab_size", _MOST_TOKENS)
    hidden = config.size("hidden_size", _MOST_WIDTH)
    layers = config.size("num_hidden_layers", _MOST_LAYERS)
    latent = architecture in _LATENT
    refuse_unsupported(config, architecture, layers, _honoured(architecture))
    positions, epsilon, theta = _DEFAULTS.get(architecture, _MOST)
    rope = read_rope(config, theta)
    if latent:
        heads = kv_heads = config.size("num_attention_heads", _MOST_HEADS)
        mla = read_mla(config, rope, heads, v3=architecture == "DeepseekV3ForCausalLM")
        head_dim = mla.key_dim
    else:
        mla = None
        heads, kv_heads, head_dim = _heads(config, hidden)
    llama, qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    if mlp_bias and not llama:
        config.refuse("mlp_bias", f"is not what {architecture} computes; only LlamaForCausalLM has these biases")
    if attention_bias and (latent or architecture == "MixtralForCausalLM"):
        config.refuse("attention_bias", f"is not supported for {architecture}; it must be false or absent")
    config.number("initializer_range", 0.0, 1e3, 0.02)
    eos = config.token_ids("eos_token_id", vocab_size)
    if stop is not None and stop.values.get("eos_token_id") is not None:
        eos = stop.token_ids("eos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size", _MOST_WIDTH),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.size("max_position_embeddings", MOST_POSITIONS, positions),
        rms_norm_eps=config.number("rms_norm_eps", 1e-30, 1.0, epsilon),
        rope=rope,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias and not qwen2,
        mlp_bias=mlp_bias,
        qk_norm=architecture in QK_NORM,
        eos_token_ids=eos,
        padding_idx=config.row("pad_token_id", vocab_size),
        moe=read_moe(config, architecture, layers),
        mla=mla,
        extra_layers=_extra_layers(config) if latent else 0,
        raw=raw,
    )


def _honoured(architecture: str) -> frozenset[str]:
    """Keys that this architecture reads and others refuse."""
    keys = MOE_KEYS.get(architecture, frozenset())
    return keys | MLA_KEYS.union(_NEXT_TOKENS) if architecture in _LATENT else keys


def _extra_layers(config: Fields) -> int:
    counts = [config.count(key, _MOST_LAYERS) for key in _NEXT_TOKENS if config.values.get(key) is not None]
    return max(counts, default=0)


def _architecture(config: Fields) -> str:
    names = config.values.get("architectures")
    supported = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1 or names[0] not in tuple(ARCHITECTURES):
        config.refuse("architectures", f"must be a list with one supported architecture; supported: {supported}")
    architecture = str(names[0])
    if "model_type" in config:
        config.choice("model_type", (ARCHITECTURES[architecture],))
    return architecture


def _heads(config: Fields, hidden: int) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the width of each."""
    heads = config.size("num_attention_heads", _MOST_HEADS)
    grouped = config.values.get("num_key_value_heads") is not None
    kv_heads = config.size("num_key_value_heads", heads) if grouped else heads
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"must divide num_attention_heads, which is {heads}")
    if config.values.get("head_dim") is not None:
        head_dim = config.size("head_dim", _MOST_WIDTH)
    elif hidden % heads:
        config.refuse("hidden_size", f"is no multiple of num_attention_heads, {heads}, and there is no head_dim")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        key = "head_dim" if config.values.get("head_dim") is not None else "hidden_size"
        config.refuse(key, f"makes heads of {head_dim} values; rotary embedding needs an even number")
    return heads, kv_heads, head_dim


def _remedy(directory: Path) -> str:
    aside = directory / UNFINISHED
    if (aside / "config.json").is_file():
        return f"a save was interrupted while it replaced the files: move what is in {aside} into {directory}"
    if aside.exists():
        return f"a save was interrupted: save again, or remove {aside}"
    return "give a Hugging Face checkpoint directory"
