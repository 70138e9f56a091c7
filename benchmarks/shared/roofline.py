"""What a decode step has to read from memory, and how fast tokens could come if it did nothing else.

    tokens/s = sampled / ((steps x weights + sum of keys x bytes per key) / 3.0 TB/s)

Weights in bf16, once a step: all but an embedding of its own, of which a step reads a row a token. Of routed experts
those that n tokens are expected to choose if every choice is as likely: E (1 - (1 - k/E)^n). Keys and values as the
engine's cache holds them. Prefill is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vexact.models import ModelConfig
from vexact.models.decoder import CausalLM
from vexact.models.layers.moe import Experts

HBM_BYTES_PER_S = 3.0e12
BYTES = 2  # of a bf16 number


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that decoding reads."""

    always: int  # of weights, by every step
    experts: int  # of all routed experts of all layers
    num_experts: int  # of a layer; 0 of a dense model
    top_k: int
    per_key: int  # of one token in the cache, over all layers

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Traffic:
        """Of a model with this config.json."""
        config = ModelConfig.from_hf_dict(raw)
        with torch.device("meta"):
            model = CausalLM(config)
        routed = sum(p.numel() for one in model.modules() if isinstance(one, Experts) for p in one.parameters())
        gathered = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
        total = sum(p.numel() for p in model.parameters())
        moe = config.moe
        return cls(
            always=BYTES * (total - routed - gathered),
            experts=BYTES * routed,
            num_experts=0 if moe is None else moe.num_experts,
            top_k=0 if moe is None else moe.top_k,
            per_key=BYTES * config.num_layers * config.num_kv_heads * (config.key_dim + config.value_dim),
        )

    def weights(self, sequences: float) -> float:
        """Bytes of weights that a step of so many tokens reads."""
        if not self.num_experts:
            return float(self.always)
        return self.always + self.experts * (1 - (1 - self.top_k / self.num_experts) ** sequences)

    def seconds(self, requests: Sequence[tuple[int, int]], slots: int) -> float:
        """To sample all of (prompt tokens, new tokens), ``slots`` of them at a time and no slot ever idle."""
        together = min(slots, len(requests))
        sampled = sum(new for _, new in requests)
        keys = sum(new * (prompt + (new - 1) / 2) for prompt, new in requests)
        return (self.weights(together) * sampled / together + keys * self.per_key) / HBM_BYTES_PER_S

    def tokens_per_s(self, requests: Sequence[tuple[int, int]], slots: int) -> float:
        return sum(new for _, new in requests) / self.seconds(requests, slots)
