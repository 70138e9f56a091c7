"""Bytes that a training forward keeps for its backward: arithmetic on the model's sizes."""

from __future__ import annotations

from math import lcm
from typing import Protocol


class DecoderSizes(Protocol):
    """What of a dense decoder decides its activations."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


def activation_bytes(
    sizes: DecoderSizes, num_tokens: int, width: int, *, recomputed: bool = False, sharing: int = 1
) -> int:
    """The most that one rank holds of the layers' activations at a time, without the LM head's.

    Args:
        num_tokens: of the micro-batch, over all ranks that share it.
        width: bytes of a number of the compute type.
        recomputed: whether layers are computed again in the backward (gradient checkpointing).
        sharing: ranks that share the micro-batch (Ulysses sequence parallelism).
    """
    per_layer = layer_bytes_per_token(sizes, width, sharing)
    passing = width * (4 * sizes.hidden_size + 2 * sizes.intermediate_size)
    if recomputed:
        # The two streams that enter each layer, and all of the one that is computed again.
        kept = 2 * sizes.num_layers * width * sizes.hidden_size + per_layer
    else:
        kept = sizes.num_layers * per_layer
    return -(-num_tokens // sharing) * (kept + passing)


def layer_bytes_per_token(sizes: DecoderSizes, width: int, sharing: int = 1) -> int:
    """What one layer keeps for its backward, per token of a rank's slice; with norms of queries and keys.

    Both sums that the norms read and both norms' outputs; queries, keys and values before and after they are normed and
    rotated; the attention's output; gate, up and their product. In fp32 the statistics of the norms, by row and head,
    and of attention, by head. Ranks that share tokens also keep the attention's output as it comes back, and the keys
    and values that were repeated to be shared.
    """
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    keys = 2 * (heads + kv_heads)  # and queries, both as wide as keys
    values = kv_heads + heads  # and outputs, both as wide as values
    if sharing > 1:
        shared = lcm(sharing, kv_heads)
        keys, values = 2 * heads + kv_heads + shared, kv_heads + shared + 2 * heads
    numbers = 4 * sizes.hidden_size + 3 * sizes.intermediate_size + keys * sizes.key_dim + values * sizes.value_dim
    return width * numbers + 4 * (2 + heads + kv_heads + heads)
