"""The operators of a dense model as everyone else runs them: torch's own kernels, not batch-invariant.

Used for deliberate baselines (``batch_invariant=false``) and for stock attention implementations. Signatures match the
invariant operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vexact.ops.attention.interface import KVCache, write_kv
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata
from vexact.ops.rotary.latent_rope import rotated_and_joined


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """torch's linear; ``out_dtype`` is applied afterwards."""
    out = F.linear(x, weight, bias)
    return out if out_dtype is None else out.to(out_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's fused RMSNorm."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual addition, then torch's RMSNorm."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate-half in the dtype of the inputs, as Hugging Face models compute it."""
    cos, sin = (t.unsqueeze(1).repeat(1, 1, 2).to(q.dtype) for t in cos_sin[positions].chunk(2, dim=-1))
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's RMSNorm of every head, then rotate-half."""
    return rope(rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps), positions, cos_sin)


def latent_rope(
    q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotate-half of the rotated slices, then torch's concatenation."""
    return rotated_and_joined(rope, q, k_plain, k_rotated, positions, cos_sin, interleaved)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in the dtype of the input."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """torch's embedding."""
    return F.embedding(ids, weight, padding_idx)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: PackedMetadata | PagedMetadata,
    softmax_scale: float,
    kv_cache: KVCache | None = None,
    causal: bool = True,
) -> Tensor:
    """scaled_dot_product_attention over sequences padded to the longest: what the name ``sdpa`` runs."""
    if isinstance(metadata, PackedMetadata):
        cu_q = cu_k = metadata.cu_seqlens.long()
        keys, values = _pad(k, cu_k), _pad(v, cu_k)
    else:
        assert kv_cache is not None
        write_kv(k, v, kv_cache, metadata.slot_mapping)
        cu_q = metadata.cu_seqlens_q.long()
        pages = metadata.block_table.long().clamp_min(0)
        keys, values = (cache[pages].flatten(1, 2)[:, : metadata.max_seqlen_k] for cache in kv_cache)
    num_queries = cu_q.diff()
    num_keys = num_queries if isinstance(metadata, PackedMetadata) else metadata.seqused_k.long()
    queries = _pad(q, cu_q)
    mask = _mask(num_queries, num_keys, queries.shape[1], keys.shape[1], causal)
    out = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask.unsqueeze(1),
        scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    ).transpose(1, 2)
    real = torch.arange(queries.shape[1], device=q.device) < num_queries.unsqueeze(1)
    return out[real]


def _mask(num_queries: Tensor, num_keys: Tensor, width_q: int, width_k: int, causal: bool) -> Tensor:
    """(B, Lq, Lk), True where visible; padded query rows see key 0 so that their softmax stays finite."""
    query = torch.arange(width_q, device=num_keys.device)
    key = torch.arange(width_k, device=num_keys.device)
    mask = (key < num_keys.unsqueeze(1)).unsqueeze(1).expand(-1, width_q, -1)
    if causal:
        offset = (num_keys - num_queries)[:, None, None]
        mask = mask & (key <= query.unsqueeze(1) + offset)
    return mask | ((query >= num_queries.unsqueeze(1)).unsqueeze(2) & (key == 0))


def _pad(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T, heads, D) -> (B, L, heads, D); rows past a sequence's end repeat its last row."""
    lengths = cu_seqlens.diff()
    index = torch.arange(int(lengths.max()), device=x.device).minimum((lengths - 1).unsqueeze(1))
    return x[cu_seqlens[:-1].unsqueeze(1) + index]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
