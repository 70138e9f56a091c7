"""The decoder that rollout and training share: of every family, by configuration, from the parts in ``layers``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vexact.models.config import ModelConfig
from vexact.models.layers import MLP, Attention, KVCache, LatentAttention, Metadata, MoE, RMSNorm, Routing, Tokens
from vexact.models.opset import OpSet, op_set
from vexact.models.rotary import cos_sin_table
from vexact.ops import linear_cross_entropy, linear_cross_entropy_trained
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy

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


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer; takes and returns (branch output, residual stream)."""

    def __init__(self, config: ModelConfig, layer: int, ops: OpSet) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RMSNorm(hidden, eps, ops)
        self.attention = Attention(config, ops) if config.mla is None else LatentAttention(config, config.mla, ops)
        self.post_norm = RMSNorm(hidden, eps, ops)
        self.mlp = (
            MoE(hidden, config.moe, layer, ops)
            if config.moe is not None and config.has_experts(layer)
            else MLP(hidden, config.intermediate_size, config.mlp_bias, ops)
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        metadata: Metadata,
        kv_cache: KVCache | None,
        route_digest: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_norm(x), x
        else:
            x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, Tokens(positions, cos_sin, metadata), kv_cache)
        x, residual = self.post_norm.add(x, residual)
        x = self.mlp(x, route_digest, routing) if isinstance(self.mlp, MoE) else self.mlp(x)
        return x, residual


class CausalLM(nn.Module):
    """Decoder with LM head. Tokens are always flat (T,): sequences are told apart by the attention metadata."""

    def __init__(self, config: ModelConfig, ops: str = "invariant", attn_impl: str = "triton-invariant") -> None:
        super().__init__()
        self.config = config
        self.ops = op_set(ops, attn_impl)
        self.recomputed_layers = 0  # the first so many are computed again in the backward (gradient checkpointing)
        # not drawn: whoever builds a model fills it, and PyTorch's draw on the meta device imports its compiler, 1 s
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(DecoderLayer(config, i, self.ops) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, self.ops)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)

    def init_rope(self, device: torch.device | str) -> None:
        """Fills the rotary table, which no checkpoint holds."""
        table = cos_sin_table(self.config.rope, self.config.rope_dim, self.config.max_position_embeddings)
        self.cos_sin = table.to(device)

    @property
    def parallel_layers(self) -> nn.ModuleList:
        """The modules that are sharded and checkpointed one by one."""
        return self.layers

    @property
    def chooses_experts(self) -> bool:
        """Whether there is a layer in which tokens choose experts."""
        return any(isinstance(layer.mlp, MoE) for layer in self.layers)

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
        route_digest: Tensor | None = None,
        routing: Routing | None = None,
    ) -> Tensor | LinearCrossEntropy | TrainedCrossEntropy:
        """Hidden states after the final norm, or with ``targets`` their log-probabilities and entropies.

        The head runs inside ``forward`` so that sharded weights are gathered when it needs them.

        Args:
            input_ids, positions: (T,) int64.
            kv_caches: one (k_cache, v_cache) per layer for paged metadata.
            route_digest: (T,) int64; a hash of the experts that each token chose, in all layers, is added to it.
            routing: what else there is to say about experts; ignored where there are none, as ``route_digest`` is.

        Returns:
            (T, H), or :class:`LinearCrossEntropy` with fields (R,) fp32, or with ``targets.dloss``
            :class:`TrainedCrossEntropy`.
        """
        x: Tensor = self.ops.embedding(input_ids, self.embed_tokens.weight, self.config.padding_idx)
        residual: Tensor | None = None
        caches = kv_caches if kv_caches is not None else [None] * len(self.layers)
        recomputed = self.recomputed_layers if torch.is_grad_enabled() else 0
        for number, (layer, kv_cache) in enumerate(zip(self.layers, caches, strict=True)):
            args = (x, residual, positions, self.cos_sin, metadata, kv_cache)
            if number >= recomputed:
                x, residual = layer(*args, route_digest, routing)
                continue
            own = None if route_digest is None else torch.zeros_like(route_digest)
            # bound, since an argument must still have its value when it is needed again
            bound = partial(layer, route_digest=own, routing=replace(routing or Routing(), again={}))
            x, residual = checkpoint(bound, *args, use_reentrant=False)
            if route_digest is not None and own is not None:
                route_digest += own  # a layer that runs again in the backward adds to its own alone
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
