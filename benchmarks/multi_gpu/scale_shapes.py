"""Sizes of the models that ``scale_model.py`` speaks of, dense and with experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vexact.config.memory import ModelShape
from vexact.config.memory.model_shape import ExpertShape
from vexact.prepare.shapes import SHAPES


class Work(Protocol):
    """What decides the bytes a decode step reads."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    concurrent: int


@dataclass(frozen=True, slots=True)
class ScaleModel:
    """A model, and how many GPUs hold one engine of it."""

    shape: ModelShape
    tensor_parallel: int = 1

    @property
    def active_intermediate(self) -> int:
        moe = self.shape.experts
        return self.shape.intermediate_size if moe is None else moe.top_k * moe.intermediate_size

    @property
    def active_parameters(self) -> int:
        """That one token passes through, the head included and the embedding not."""
        embedding = 0 if self.shape.is_tied else self.shape.vocab_size * self.shape.hidden_size
        return self.shape.num_active_parameters - embedding

    def flops(self, tokens: int, length: int) -> float:
        """Of an update with recomputed activations: 8 a weight and token, and causal attention over ``length``."""
        attention = 4 * self.shape.num_heads * self.shape.head_dim * length / 2 * self.shape.num_layers
        return tokens * (8 * self.active_parameters + 4 * attention)

    def decode_bytes(self, work: Work) -> float:
        """That one GPU reads while it samples: weights once a decode step, keys and values of every sequence.

        An engine over several GPUs has all their sequences and a share of the weights and keys on each.
        """
        rounds = max(1.0, work.sequences * self.tensor_parallel / work.concurrent)
        weights = 2 * self.shape.num_parameters / self.tensor_parallel * rounds * work.new_tokens
        mean_keys = work.prompt_tokens + work.new_tokens / 2
        return weights + 2 * self.shape.kv_values_per_token * work.sequences * work.new_tokens * mean_keys


def _dense(name: str, parts: int = 1) -> ScaleModel:
    return ScaleModel(ModelShape.of(SHAPES[name]), parts)


def _shape(*sizes: int, experts: int | None = None) -> ModelShape:
    """Sizes: hidden, intermediate, layers, heads, key heads, vocabulary. Heads are 128 wide, the head is not tied.

    With ``experts`` a token goes to 8 of so many, which are as wide as ``intermediate`` says, in every layer.
    """
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    moe = None if experts is None else ExpertShape(experts, 8, intermediate, 0, layers)
    return ModelShape(hidden, intermediate, layers, heads, kv_heads, 128, vocab, False, experts=moe)


MODELS = {
    "qwen3-1.7b": _dense("qwen3-1.7b"),
    "qwen3-8b": _dense("qwen3-8b"),
    "qwen3-32b": ScaleModel(_shape(5120, 25600, 64, 64, 8, 151936), 2),
    "llama3.1-70b": ScaleModel(_shape(8192, 28672, 80, 64, 8, 128256), 4),
    "qwen3-30b-a3b": ScaleModel(_shape(2048, 768, 48, 32, 4, 151936, experts=128), 2),
    "qwen3-235b-a22b": ScaleModel(_shape(4096, 1536, 94, 64, 4, 151936, experts=128), 8),
}
