"""Sizes of the models that ``scale_model.py`` speaks of, dense and with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from vexact.config.memory import ModelShape
from vexact.prepare.shapes import SHAPES


class Work(Protocol):
    """What decides the bytes a decode step reads."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    concurrent: int


@dataclass(frozen=True, slots=True)
class ExpertShape(ModelShape):
    """A decoder whose feed-forward is ``num_experts`` experts, ``intermediate_size`` wide together per token."""

    num_experts: int = 1
    experts_per_token: int = 1

    @property
    def layer_parameters(self) -> int:
        expert = 3 * self.hidden_size * self.intermediate_size // self.experts_per_token
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + self.num_experts * (expert + self.hidden_size) + 2 * self.hidden_size


@dataclass(frozen=True, slots=True)
class ScaleModel:
    """A model, and how many GPUs hold one engine of it."""

    shape: ModelShape
    tensor_parallel: int = 1

    @property
    def active_intermediate(self) -> int:
        return self.shape.intermediate_size

    @property
    def active_parameters(self) -> int:
        """That one token passes through, the head included and the embedding not."""
        dense = replace(self.shape, num_experts=1, experts_per_token=1) if self.is_sparse else self.shape
        return dense.num_layers * dense.layer_parameters + dense.vocab_size * dense.hidden_size

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.shape, ExpertShape)

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


def _shape(kind: type[ModelShape], *sizes: int, **more: int) -> ModelShape:
    """Sizes: hidden, intermediate, layers, heads, key heads, vocabulary. Heads are 128 wide, the head is not tied."""
    *rest, vocab = sizes
    return kind(*rest, 128, vocab, False, **more)


MODELS = {
    "qwen3-1.7b": _dense("qwen3-1.7b"),
    "qwen3-8b": _dense("qwen3-8b"),
    "qwen3-32b": ScaleModel(_shape(ModelShape, 5120, 25600, 64, 64, 8, 151936), 2),
    "llama3.1-70b": ScaleModel(_shape(ModelShape, 8192, 28672, 80, 64, 8, 128256), 4),
    "qwen3-30b-a3b": ScaleModel(
        _shape(ExpertShape, 2048, 8 * 768, 48, 32, 4, 151936, num_experts=128, experts_per_token=8), 2
    ),
    "qwen3-235b-a22b": ScaleModel(
        _shape(ExpertShape, 4096, 8 * 1536, 94, 64, 4, 151936, num_experts=128, experts_per_token=8), 8
    ),
}
