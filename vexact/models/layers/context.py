"""What every layer of one forward gets to know about its tokens, besides their hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vexact.models.layers.balance import Balance
from vexact.models.opset import OpSet
from vexact.models.sequence_parallel import SlicedMetadata
from vexact.ops import HeadNorms, PackedMetadata, PagedMetadata, cached_attention, rope_to_cache

Metadata = PackedMetadata | SlicedMetadata | PagedMetadata
KVCache = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Where the T tokens stand: in their sequences, and the sequences among each other."""

    positions: Tensor  # (T,) int64
    cos_sin: Tensor  # (P, rope_dim) fp32
    metadata: Metadata

    def rotate_and_attend(
        self,
        ops: OpSet,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norms: HeadNorms | None,
        softmax_scale: float,
        kv_cache: KVCache | None,
    ) -> Tensor:
        """Norm of every head, if any, rotation and :meth:`attend`."""
        positions, cos_sin, metadata = self.positions, self.cos_sin, self.metadata
        if kv_cache is not None and isinstance(metadata, PagedMetadata) and ops.fuses_cache:
            q = rope_to_cache(q, k, v, norms, positions, cos_sin, kv_cache, metadata.slot_mapping)
            return cached_attention(q, metadata, softmax_scale, kv_cache)
        if norms is None:
            q, k = ops.rope(q, k, positions, cos_sin)
        else:
            q, k = ops.qk_norm_rope(q, k, *norms, positions, cos_sin)
        return self.attend(ops, q, k, v, softmax_scale, kv_cache)

    def attend(
        self, ops: OpSet, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, kv_cache: KVCache | None
    ) -> Tensor:
        """q (T, Hq, D), k (T, Hkv, D), v (T, Hkv, Dv) -> (T, Hq, Dv)."""
        out: Tensor
        if isinstance(self.metadata, SlicedMetadata):
            out = self.metadata.attend(ops.attention, q, k, v, softmax_scale)
        else:
            out = ops.attention(q, k, v, self.metadata, softmax_scale, kv_cache)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What training and padded batches have to say about the experts of T tokens. All optional."""

    padding: Tensor | None = None  # (T,) bool: rows that nobody reads; no expert is loaded for them
    loads: Tensor | None = None  # (layers, E) int64; a layer overwrites its row with the tokens of each expert
    balance: Balance | None = None  # a loss that is added in the backward
    again: dict[str, Any] | None = None  # of a layer that runs again in the backward: what need not be asked twice
