"""How large the rollout's key-value cache is."""

from __future__ import annotations

from vexact.config.memory.model_shape import ModelShape
from vexact.config.schema import Config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_KV_CACHE_BYTES = 256 * 2**20  # the engine's own default


def page_bytes(config: Config, device: str, shape: ModelShape) -> int:
    return shape.kv_values_per_token * BYTES[config.dtype(device)] * config.rollout.page_size


def pages_per_sequence(config: Config) -> int:
    """Of the longest prompt and response."""
    return -(-config.max_model_len // config.rollout.page_size)


def kv_cache_tokens(config: Config, device: str, shape: ModelShape) -> int | None:
    """Tokens the key-value cache holds; None on a GPU whose free memory decides."""
    rollout = config.rollout
    if rollout.num_pages is not None:
        return rollout.num_pages * rollout.page_size
    budget = rollout.kv_cache_bytes or (CPU_KV_CACHE_BYTES if device == "cpu" else None)
    if budget is None:
        return None
    return useful_pages(config, budget // page_bytes(config, device, shape)) * rollout.page_size


def useful_pages(config: Config, pages: int) -> int:
    """No more than all running requests need at full length."""
    return min(pages, config.rollout.max_num_seqs * pages_per_sequence(config))
