"""The sizes of a decoder that decide how much memory it takes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vexact.config.fields import ConfigError


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Multi-head latent attention: queries (if at all), keys and values are expanded from vectors of a low rank."""

    query_rank: int | None
    key_value_rank: int
    nope_dim: int  # columns of a key that are expanded per head
    rope_dim: int  # columns that are rotated, and shared by all heads
    value_dim: int

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> LatentShape:
        """From the keys of config.json. Raises KeyError for one that is missing."""
        widths = (sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"], sizes["v_head_dim"])
        return cls(sizes.get("q_lora_rank"), sizes["kv_lora_rank"], *widths)

    @property
    def key_dim(self) -> int:
        """Columns of a query or key."""
        return self.nope_dim + self.rope_dim

    def parameters(self, hidden_size: int, num_heads: int) -> int:
        """Of the weight matrices of one layer's attention."""
        queries, expanded = num_heads * self.key_dim, num_heads * (self.nope_dim + self.value_dim)
        reduced = hidden_size * (self.key_value_rank + self.rope_dim) + self.key_value_rank * expanded
        asked = hidden_size * queries if self.query_rank is None else self.query_rank * (hidden_size + queries)
        return asked + reduced + num_heads * self.value_dim * hidden_size


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Layers whose feed-forward is a mixture of experts; the others are dense."""

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    shared_intermediate_size: int  # of the feed-forward that every token goes through; 0 for none
    num_layers: int

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> ExpertShape | None:
        """From the keys of config.json, under the names of any family; None where no layer has any. Raises KeyError."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        num_experts = next((sizes[name] for name in names if sizes.get(name)), None)
        if num_experts is None:
            return None
        width, layers = sizes.get("moe_intermediate_size") or sizes["intermediate_size"], sizes["num_hidden_layers"]
        step, first = sizes.get("decoder_sparse_step") or 1, sizes.get("first_k_dense_replace") or 0
        every, dense = sizes.get("moe_layer_freq") or 1, sizes.get("mlp_only_layers") or ()
        routed = [i for i in range(first, layers) if (i + 1) % step == 0 and i % every == 0 and i not in dense]
        if not routed:
            return None
        shared = (sizes.get("n_shared_experts") or 0) * width
        return cls(num_experts, sizes["num_experts_per_tok"], width, shared, len(routed))

    def parameters(self, hidden_size: int, num_experts: int) -> int:
        """Of one layer's feed-forward with so many of the experts, its router and what all tokens share."""
        widths = num_experts * self.intermediate_size + self.shared_intermediate_size
        return 3 * hidden_size * widths + self.num_experts * hidden_size


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Weight matrices and norms of a decoder; biases and per-head norms are too small to matter."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool  # the head is the embedding
    latent: LatentShape | None = None  # where attention is of this kind; then ``head_dim`` is not used
    experts: ExpertShape | None = None

    @classmethod
    def read(cls, directory: str) -> ModelShape:
        """From config.json of a decoder checkpoint.

        Raises:
            ConfigError: the file is not JSON, or lacks the sizes of a decoder.
        """
        path = Path(os.path.expanduser(directory)) / "config.json"
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        except KeyError as error:
            raise ConfigError(f"{path} has no {error}: it does not describe a decoder model") from error

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> ModelShape:
        """From the keys of config.json. Raises KeyError for one that is missing."""
        hidden, layers, heads = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
        return cls(
            hidden_size=hidden,
            intermediate_size=sizes["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=sizes.get("num_key_value_heads") or heads,
            head_dim=sizes.get("head_dim") or hidden // heads,
            vocab_size=sizes["vocab_size"],
            is_tied=bool(sizes.get("tie_word_embeddings")),
            latent=LatentShape.of(sizes) if sizes.get("kv_lora_rank") else None,
            experts=ExpertShape.of(sizes),
        )

    @property
    def key_dim(self) -> int:
        """Columns of a query or key head, as they are cached."""
        return self.latent.key_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Columns of a value head."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer's attention."""
        if self.latent:
            return self.latent.parameters(self.hidden_size, self.num_heads)
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def num_expert_layers(self) -> int:
        return 0 if self.experts is None else self.experts.num_layers

    @property
    def dense_layer_parameters(self) -> int:
        """Of one layer without experts."""
        return self.attention_parameters + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    def expert_layer_parameters(self, num_experts: int) -> int:
        """Of one layer with so many of its experts."""
        if self.experts is None:
            return 0
        return self.attention_parameters + self.experts.parameters(self.hidden_size, num_experts) + 2 * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Of the largest layer."""
        return self.largest_layer(0 if self.experts is None else self.experts.num_experts)

    def largest_layer(self, num_experts: int) -> int:
        """Parameters of the largest layer, with so many of its experts."""
        dense = self.dense_layer_parameters if self.num_layers > self.num_expert_layers else 0
        return max(dense, self.expert_layer_parameters(num_experts) if self.num_expert_layers else 0)

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm."""
        return (1 if self.is_tied else 2) * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def num_parameters(self) -> int:
        return self._parameters(0 if self.experts is None else self.experts.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Those that one token meets."""
        return self._parameters(0 if self.experts is None else self.experts.top_k)

    def _parameters(self, num_experts: int) -> int:
        dense = (self.num_layers - self.num_expert_layers) * self.dense_layer_parameters
        return dense + self.num_expert_layers * self.expert_layer_parameters(num_experts) + self.root_parameters

    @property
    def kv_values_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.num_layers * self.num_kv_heads * (self.key_dim + self.value_dim)
