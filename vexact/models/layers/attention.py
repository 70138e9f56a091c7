"""Self-attention with projected queries, keys and values; several query heads may share a key head."""

from __future__ import annotations

from torch import Tensor, nn

from vexact.models.config import ModelConfig
from vexact.models.layers.context import KVCache, Tokens
from vexact.models.layers.norm import RMSNorm
from vexact.models.opset import OpSet
from vexact.ops import HeadNorms


class Attention(nn.Module):
    """Fused qkv projection, optional per-head q/k norm, rotary embedding."""

    def __init__(self, config: ModelConfig, ops: OpSet) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.head_counts = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.qkv_sizes[0], config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None

    def forward(self, x: Tensor, tokens: Tokens, kv_cache: KVCache | None) -> Tensor:
        """(T, H) -> (T, H)."""
        ops, qkv_proj, o_proj = self.ops, self.qkv_proj, self.o_proj
        qkv = ops.linear(x, qkv_proj.weight, qkv_proj.bias)
        q, k, v = qkv.unflatten(1, (-1, self.config.head_dim)).split(self.head_counts, dim=1)  # (T, heads, D)
        q_norm, k_norm = self.q_norm, self.k_norm
        norms = None if q_norm is None or k_norm is None else HeadNorms(q_norm.weight, k_norm.weight, q_norm.eps)
        out = tokens.rotate_and_attend(ops, q, k, v, norms, self.config.softmax_scale, kv_cache)
        projected: Tensor = ops.linear(out.flatten(1), o_proj.weight, o_proj.bias)
        return projected
