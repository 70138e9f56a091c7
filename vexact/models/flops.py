"""Floating point operations that a model needs, whatever computes it.

Counted as Chowdhery et al. count them (PaLM, arXiv 2204.02311, appendix B): a product of matrices takes 2 operations a
weight and row, the backward twice the forward, and nothing that is computed again (gradient checkpointing, an audit)
counts. Unlike there, a query meets only the keys that it may see, the embedding, which is read and not multiplied,
counts nothing, and the head is needed for response tokens alone. So numbers are somewhat lower than those of frameworks
that count the whole square of attention.
"""

from __future__ import annotations

from collections.abc import Iterable

from vexact.models.config import ModelConfig

_BACKWARD_TOO = 3  # forward, gradient of the input, gradient of the weight


def training_flops(config: ModelConfig, lengths: Iterable[tuple[int, int]]) -> int:
    """Operations of one forward and backward over sequences of (prompt, response) tokens each."""
    tokens = rows = pairs = 0
    for prompt, response in lengths:
        whole = prompt + response
        tokens += whole
        rows += response
        pairs += whole * (whole + 1) // 2
    attention = 2 * config.num_layers * config.num_heads * (config.key_dim + config.value_dim)
    head = 2 * config.hidden_size * config.vocab_size
    return _BACKWARD_TOO * (2 * layer_weights(config) * tokens + attention * pairs + head * rows)


def layer_weights(config: ModelConfig) -> int:
    """Weights of all layers that one token is multiplied with: of a mixture, those of its own experts."""
    return sum(_attention(config) + _feed_forward(config, layer) for layer in range(config.num_layers))


def _attention(config: ModelConfig) -> int:
    hidden, queries = config.hidden_size, config.num_heads * config.key_dim
    output = config.num_heads * config.value_dim * hidden
    mla = config.mla
    if mla is None:
        return hidden * sum(config.qkv_sizes) + output
    asked = hidden * queries if mla.q_rank is None else mla.q_rank * (hidden + queries)
    latent = hidden * (mla.kv_rank + mla.rope_dim)
    expanded = mla.kv_rank * config.num_heads * (mla.nope_dim + mla.value_dim)
    return asked + latent + expanded + output


def _feed_forward(config: ModelConfig, layer: int) -> int:
    """Gate, up and down; of experts also the router."""
    if config.moe is None or not config.has_experts(layer):
        return 3 * config.hidden_size * config.intermediate_size
    moe = config.moe
    widths = moe.top_k * moe.intermediate_size + moe.shared_intermediate_size
    return config.hidden_size * (3 * widths + moe.num_experts)
