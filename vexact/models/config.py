"""Model configuration: what a Hugging Face ``config.json`` says, checked and flattened."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; fields other than ``type`` and ``theta`` belong to the scaling of that type."""

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    raw: dict[str, Any]

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Widths of the query, key and value parts of the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf_dir(cls, path: str | Path) -> ModelConfig:
        """Reads ``config.json`` (and ``generation_config.json`` for stop tokens).

        Raises:
            FileNotFoundError: the directory or its config.json is missing.
            ValueError: unsupported architecture or feature.
        """
        directory = Path(path)
        file = directory / "config.json"
        if not file.is_file():
            what = "has no config.json" if directory.is_dir() else "does not exist"
            raise FileNotFoundError(f"model directory {directory} {what}; give a Hugging Face checkpoint directory")
        raw = json.loads(file.read_text())
        generation = directory / "generation_config.json"
        stop = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
        return cls.from_hf_dict(raw, eos_token_id=stop)

    @classmethod
    def from_hf_dict(cls, raw: dict[str, Any], eos_token_id: int | list[int] | None = None) -> ModelConfig:
        """Interprets a Hugging Face configuration; ``eos_token_id`` overrides the one in it."""
        architecture = (raw.get("architectures") or ["(none)"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unsupported architecture {architecture!r}; supported: {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(raw)
        heads = raw["num_attention_heads"]
        attention_bias = bool(raw.get("attention_bias", False))
        qwen2 = architecture == "Qwen2ForCausalLM"
        eos = eos_token_id if eos_token_id is not None else raw.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope=_rope_config(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen2 or attention_bias,
            output_bias=attention_bias and not qwen2,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            raw=raw,
        )


def _rope_config(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 nests everything under rope_parameters; older configs use rope_theta and rope_scaling
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"unsupported rope_type {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    original = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))
    return RopeConfig(
        type=kind,
        theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        factor=float(rope.get("factor", 1.0)),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(original),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ()):
        raise ValueError("sliding-window attention is not supported; use a checkpoint with use_sliding_window=false")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"unsupported hidden_act {raw['hidden_act']!r}; supported: silu")
    if raw.get("quantization_config"):
        raise ValueError("quantised checkpoints are not supported; use the bf16 or fp32 original")
