"""What every layer of one forward gets to know about its tokens, besides their hidden states."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vexact.models.layers.balance import Balance
from vexact.models.opset import OpSet
from vexact.models.sequence_parallel import SlicedMetadata
from vexact.ops import PackedMetadata, PagedMetadata

Metadata = PackedMetadata | SlicedMetadata | PagedMetadata
KVCache = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Where the T tokens stand: in their sequences, and the sequences among each other."""

    positions: Tensor  # (T,) int64
    cos_sin: Tensor  # (P, rope_dim) fp32
    metadata: Metadata

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
