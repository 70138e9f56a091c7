"""Bytes that a training forward keeps for its backward: arithmetic on the model's sizes."""

from __future__ import annotations

from math import lcm

from vexact.config.memory.model_shape import ModelShape


def activation_bytes(
    sizes: ModelShape,
    num_tokens: int,
    width: int,
    *,
    recomputed: int = 0,
    sharing: int = 1,
    rows_travel: bool = False,
) -> int:
    """The most that one rank holds of the layers' activations at a time, without the LM head's.

    Args:
        num_tokens: of the micro-batch, over all ranks that share it.
        width: bytes of a number of the compute type.
        recomputed: layers, the first ones, that are computed again in the backward (gradient checkpointing).
        sharing: ranks that share the micro-batch (Ulysses sequence parallelism).
        rows_travel: whether experts are on other ranks. One that gets more than its share of the rows needs more.
    """
    layers = {experts: layer_bytes_per_token(sizes, width, sharing, experts=experts) for experts in _kinds(sizes)}
    passing = max(_passing(sizes, width, experts) for experts in layers)
    if rows_travel and sizes.experts is not None:
        row = width * sizes.experts.top_k * sizes.hidden_size
        layers[True] += row  # as it has arrived
        passing += 2 * row  # gradients, before they leave and as they arrive
    # The two streams that enter each layer that is computed again, and what the others keep, which is gone when the
    # first of those is computed: there is always room for one. Which layers have experts is not asked: the largest do.
    streams = 2 * recomputed * width * sizes.hidden_size
    by_size = sorted((size for kind, size in layers.items() for _ in range(_kinds(sizes)[kind])), reverse=True)
    kept = sum(by_size[: max(1, sizes.num_layers - recomputed)])
    return -(-num_tokens // sharing) * (streams + kept + passing)


def _kinds(sizes: ModelShape) -> dict[bool, int]:
    """How many layers there are with experts and without; only kinds that there are."""
    kinds = {True: sizes.num_expert_layers, False: sizes.num_layers - sizes.num_expert_layers}
    return {experts: count for experts, count in kinds.items() if count}


def _passing(sizes: ModelShape, width: int, experts: bool) -> int:
    """Bytes a token of what one layer's backward needs beside what was kept."""
    moe, hidden = sizes.experts if experts else None, sizes.hidden_size
    if moe is None:
        return width * (4 * hidden + 2 * sizes.intermediate_size)
    return width * (4 * hidden + moe.top_k * (2 * hidden + 2 * moe.intermediate_size))


def layer_bytes_per_token(sizes: ModelShape, width: int, sharing: int = 1, *, experts: bool = False) -> int:
    """What one layer keeps for its backward, per token of a rank's slice; with norms of queries and keys.

    Both sums that the norms read and both norms' outputs; queries, keys and values before and after they are normed and
    rotated; the attention's output; gate, up and their product. In fp32 the statistics of the norms, by row and head,
    and of attention, by head. Ranks that share tokens also keep the attention's output as it comes back, and the keys
    and values that were repeated to be shared. With ``experts`` a token has k rows, whose results are kept as well; the
    router's logits are fp32, and weights, experts and places of the rows take 4 bytes each.
    """
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    keys = 2 * (heads + kv_heads)  # and queries, both as wide as keys
    values = kv_heads + heads  # and outputs, both as wide as values
    if sharing > 1:
        shared = lcm(sharing, kv_heads)
        keys, values = 2 * heads + kv_heads + shared, kv_heads + shared + 2 * heads
    feed_forward, of_router = 3 * sizes.intermediate_size, 0
    if experts:
        moe = sizes.experts
        assert moe is not None, "the model has none"
        feed_forward = moe.top_k * (3 * moe.intermediate_size + sizes.hidden_size) + 3 * moe.shared_intermediate_size
        of_router = moe.num_experts + 4 * moe.top_k
    numbers = 4 * sizes.hidden_size + feed_forward + keys * sizes.key_dim + values * sizes.value_dim
    return width * numbers + 4 * (2 + heads + kv_heads + heads + of_router)
