"""Self-attention with projected queries, keys and values; several query heads may share a key head."""

from __future__ import annotations

from torch import Tensor, nn

from vexact.models.config import ModelConfig
from vexact.models.layers.context import KVCache, Tokens
from vexact.models.layers.norm import RMSNorm
from vexact.models.opset import OpSet


class Attention(nn.Module):
    """Fused qkv projection, optional per-head q/k norm, rotary embedding."""

    def __init__(self, config: ModelConfig, ops: OpSet) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.qkv_proj = nn.Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.qkv_sizes[0], config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None

    def forward(self, x: Tensor, tokens: Tokens, kv_cache: KVCache | None) -> Tensor:
        """(T, H) -> (T, H)."""
        qkv = self.ops.linear(x, self.qkv_proj.weight, self.qkv_proj.bias)
        q, k, v = (
            part.unflatten(1, (-1, self.config.head_dim)) for part in qkv.split(self.config.qkv_sizes, dim=1)
        )  # (T, heads, D)
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            q, k = self.ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, tokens.positions, tokens.cos_sin)
        else:
            q, k = self.ops.rope(q, k, tokens.positions, tokens.cos_sin)
        out = tokens.attend(self.ops, q, k, v, self.config.softmax_scale, kv_cache)
        projected: Tensor = self.ops.linear(out.flatten(1), self.o_proj.weight, self.o_proj.bias)
        return projected
