"""The operators of :mod:`vexact.ops` as everyone else runs them, not batch-invariant: what baselines are made of."""

from vexact.ops.stock.dense import (
    add_rms_norm,
    attention,
    embedding,
    latent_rope,
    linear,
    qk_norm_rope,
    rms_norm,
    rope,
    swiglu,
)
from vexact.ops.stock.moe import combine, group_tokens, grouped_linear, grouped_swiglu, route, route_and_group

__all__ = [
    "add_rms_norm",
    "attention",
    "combine",
    "embedding",
    "group_tokens",
    "grouped_linear",
    "grouped_swiglu",
    "latent_rope",
    "linear",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "route",
    "route_and_group",
    "swiglu",
]
