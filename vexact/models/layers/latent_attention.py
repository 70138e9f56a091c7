"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its expanded form.

Keys and values are expanded from the latent vector before attention, in training and in rollout: multiplying the
queries by that expansion instead, as decoding engines like to, is another arithmetic, and another model's bits.
"""

from __future__ import annotations

from torch import Tensor, nn

from vexact.models.config import MlaConfig, ModelConfig
from vexact.models.layers.context import KVCache, Tokens
from vexact.models.layers.norm import RMSNorm
from vexact.models.opset import OpSet

LATENT_EPS = 1e-6  # of the norms of latent vectors, in the reference model, whatever rms_norm_eps says


class LatentAttention(nn.Module):
    """One fused projection to the queries (or their latent vector), the latent vector of keys and values, and the
    rotated slice that all heads' keys share; then the expansions."""

    def __init__(self, config: ModelConfig, mla: MlaConfig, ops: OpSet) -> None:
        super().__init__()
        self.config, self.mla, self.ops = config, mla, ops
        queries, _, values = config.qkv_sizes
        first = queries if mla.q_rank is None else mla.q_rank
        self.first_sizes = first, mla.kv_rank, mla.rope_dim
        self.qkv_a_proj = nn.Linear(config.hidden_size, sum(self.first_sizes), bias=False)
        if mla.q_rank is not None:
            self.q_a_norm = RMSNorm(mla.q_rank, LATENT_EPS, ops)
            self.q_b_proj = nn.Linear(mla.q_rank, queries, bias=False)
        self.kv_a_norm = RMSNorm(mla.kv_rank, LATENT_EPS, ops)
        self.kv_b_proj = nn.Linear(mla.kv_rank, config.num_heads * (mla.nope_dim + mla.value_dim), bias=False)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, tokens: Tokens, kv_cache: KVCache | None) -> Tensor:
        """(T, H) -> (T, H)."""
        mla, heads = self.mla, self.config.num_heads
        q, latent, k_rotated = self.ops.linear(x, self.qkv_a_proj.weight).split(self.first_sizes, dim=1)
        if mla.q_rank is not None:
            q = self.ops.linear(self.q_a_norm(q), self.q_b_proj.weight)
        expanded = self.ops.linear(self.kv_a_norm(latent), self.kv_b_proj.weight)
        k_plain, v = expanded.unflatten(1, (heads, -1)).split((mla.nope_dim, mla.value_dim), dim=2)
        q, k = self.ops.latent_rope(
            q.unflatten(1, (heads, mla.key_dim)), k_plain, k_rotated, tokens.positions, tokens.cos_sin, mla.interleaved
        )
        out = tokens.attend(self.ops, q, k, v, mla.softmax_scale, kv_cache)
        projected: Tensor = self.ops.linear(out.flatten(1), self.o_proj.weight)
        return projected
