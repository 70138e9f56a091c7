"""The dense decoder that rollout and training share: Qwen3, Qwen2 and Llama by configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vexact.models.config import ModelConfig
from vexact.models.opset import OpSet, op_set
from vexact.models.rotary import cos_sin_table
from vexact.models.sequence_parallel import SlicedMetadata
from vexact.ops import PackedMetadata, PagedMetadata, linear_cross_entropy, linear_cross_entropy_trained
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy

Metadata = PackedMetadata | SlicedMetadata | PagedMetadata
KVCache = tuple[Tensor, Tensor]


PROBE_ROWS = 256  # rows of logits shown at a time: 150 MB at a vocabulary of 152 k


@dataclass(frozen=True, slots=True, eq=False)
class LogitProbe:
    """Shows raw logits of some targets during the forward; it changes no result."""

    rows: Tensor  # (K,) int64 into the R targets
    see: Callable[[Tensor, slice], None]  # called with logits (k, V) fp32 and which of the K rows they are of


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Which rows of the batch predict which token; R of the T rows (prompt rows need no logits)."""

    rows: Tensor  # (R,) int64 into the T packed tokens
    token_ids: Tensor  # (R,) int64, the token each row predicts
    inv_temperature: Tensor  # (R,) fp32
    min_logit: Tensor  # (R,) fp32
    # d loss / d logprob of the targets in a slice, for a loss that is elementwise in the log-probability: gradients of
    # the head are then taken in the forward, see ops.linear_cross_entropy_trained
    dloss: Callable[[Tensor, slice], Tensor] | None = None
    probe: LogitProbe | None = None


class Attention(nn.Module):
    """Self-attention with fused qkv projection, optional per-head q/k norm, rotary embedding."""

    def __init__(self, config: ModelConfig, ops: OpSet) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.qkv_proj = nn.Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.qkv_sizes[0], config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops) if config.qk_norm else None

    def forward(
        self, x: Tensor, positions: Tensor, cos_sin: Tensor, metadata: Metadata, kv_cache: KVCache | None
    ) -> Tensor:
        head_dim = self.config.head_dim
        qkv = self.ops.linear(x, self.qkv_proj.weight, self.qkv_proj.bias)
        q, k, v = (
            part.unflatten(1, (-1, head_dim)) for part in qkv.split(self.config.qkv_sizes, dim=1)
        )  # (T, heads, D)
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight, self.k_norm.weight
            q, k = self.ops.qk_norm_rope(q, k, *weights, self.q_norm.eps, positions, cos_sin)
        else:
            q, k = self.ops.rope(q, k, positions, cos_sin)
        if isinstance(metadata, SlicedMetadata):
            out = metadata.attend(self.ops.attention, q, k, v, head_dim**-0.5)
        else:
            out = self.ops.attention(q, k, v, metadata, head_dim**-0.5, kv_cache)
        return self.ops.linear(out.flatten(1), self.o_proj.weight, self.o_proj.bias)


class MLP(nn.Module):
    """SwiGLU feed-forward with fused gate and up projections."""

    def __init__(self, config: ModelConfig, ops: OpSet) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.ops.linear(x, self.gate_up_proj.weight, self.gate_up_proj.bias)
        return self.ops.linear(self.ops.swiglu(gate_up), self.down_proj.weight, self.down_proj.bias)


class RMSNorm(nn.Module):
    """Holds the weight of a norm; adds a residual first when given one."""

    def __init__(self, width: int, eps: float, ops: OpSet) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer; takes and returns (branch output, residual stream)."""

    def __init__(self, config: ModelConfig, ops: OpSet) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.attention = Attention(config, ops)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        metadata: Metadata,
        kv_cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_norm(x), x
        else:
            x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, positions, cos_sin, metadata, kv_cache)
        x, residual = self.post_norm.add(x, residual)
        return self.mlp(x), residual


class CausalLM(nn.Module):
    """Decoder with LM head. Tokens are always flat (T,): sequences are told apart by the attention metadata."""

    def __init__(self, config: ModelConfig, ops: str = "invariant", attn_impl: str = "triton-invariant") -> None:
        super().__init__()
        self.config = config
        self.ops = op_set(ops, attn_impl)
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, self.ops) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.ops)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)

    def init_rope(self, device: torch.device | str) -> None:
        """Fills the rotary table, which no checkpoint holds."""
        table = cos_sin_table(self.config.rope, self.config.head_dim, self.config.max_position_embeddings)
        self.cos_sin = table.to(device)

    @property
    def parallel_layers(self) -> nn.ModuleList:
        """The modules that are sharded and checkpointed one by one."""
        return self.layers

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, H)."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        metadata: Metadata,
        kv_caches: list[KVCache] | None = None,
        targets: Targets | None = None,
    ) -> Tensor | LinearCrossEntropy | TrainedCrossEntropy:
        """Hidden states after the final norm, or with ``targets`` their log-probabilities and entropies.

        The head runs inside ``forward`` so that sharded weights are gathered when it needs them.

        Args:
            input_ids, positions: (T,) int64.
            kv_caches: one (k_cache, v_cache) per layer for paged metadata.

        Returns:
            (T, H), or :class:`LinearCrossEntropy` with fields (R,) fp32, or with ``targets.dloss``
            :class:`TrainedCrossEntropy`.
        """
        x: Tensor = self.ops.embedding(input_ids, self.embed_tokens.weight, self.config.padding_idx)
        residual: Tensor | None = None
        caches = kv_caches if kv_caches is not None else [None] * len(self.layers)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer, kv_cache in zip(self.layers, caches, strict=True):
            args = (x, residual, positions, self.cos_sin, metadata, kv_cache)
            x, residual = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        assert residual is not None, "a decoder has at least one layer"
        hidden = self.norm.add(x, residual)[0]
        if targets is None:
            return hidden
        rows = hidden.index_select(0, targets.rows)
        if targets.probe is not None:
            self._show_logits(rows, targets.probe)
        kept = targets.inv_temperature, targets.min_logit
        if targets.dloss is not None:
            return linear_cross_entropy_trained(rows, self.lm_head_weight, targets.token_ids, targets.dloss, *kept)
        return linear_cross_entropy(rows, self.lm_head_weight, targets.token_ids, *kept)

    @torch.no_grad()
    def _show_logits(self, hidden: Tensor, probe: LogitProbe) -> None:
        for start in range(0, len(probe.rows), PROBE_ROWS):
            some = slice(start, start + PROBE_ROWS)
            probe.see(self.logits(hidden.index_select(0, probe.rows[some])), some)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, H) -> (T, V) fp32, never rounded to the model's dtype."""
        return self.ops.linear(hidden, self.lm_head_weight, out_dtype=torch.float32)
