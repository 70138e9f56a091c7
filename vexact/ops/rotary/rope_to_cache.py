"""Everything between the projection of queries, keys and values and paged attention, in one launch, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vexact.ops.attention.checks import check_pages
from vexact.ops.attention.interface import KVCache, write_kv
from vexact.ops.checks import check_per_row
from vexact.ops.dispatch import backend
from vexact.ops.rotary.qk_norm_rope import check_norms, qk_norm_rope
from vexact.ops.rotary.rope import check_rope, rope


class HeadNorms(NamedTuple):
    """RMSNorm of every head before its rotation."""

    q_weight: Tensor  # (D,)
    k_weight: Tensor  # (D,)
    eps: float


def rope_to_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norms: HeadNorms | None,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: KVCache,
    slot_mapping: Tensor,
) -> Tensor:
    """:func:`qk_norm_rope`, or without ``norms`` :func:`rope`, then :func:`write_kv` of keys and values, bit for bit.

    Args:
        q: (T, Hq, D). k: (T, Hkv, D). v: (T, Hkv, Dv); views of a fused projection are read in place.
        positions: (T,) int64. cos_sin: (P, D) fp32, cosines in the first D/2 columns and sines in the last.
        slot_mapping: (T,) int64; a negative slot is skipped.

    Returns:
        q', contiguous. Differentiable as the operators are, but no gradient goes through the cache.

    Raises:
        ValueError: tensors that do not fit together, or that the cache is not of.
    """
    if torch.is_grad_enabled() or not all(pages.is_contiguous() for pages in kv_cache):
        q, k = rope(q, k, positions, cos_sin) if norms is None else qk_norm_rope(q, k, *norms, positions, cos_sin)
        write_kv(k, v, kv_cache, slot_mapping)
        return q
    check_rope("rope_to_cache", q, k, positions, cos_sin)
    if norms is not None:
        check_norms("rope_to_cache", q, norms.q_weight, norms.k_weight)
    check_pages("rope_to_cache", k, v, kv_cache)
    check_per_row("rope_to_cache", q.shape[0], torch.int64, slot_mapping=slot_mapping)
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    out: Tensor = backend("rotary.rope_to_cache", q).forward(
        q, k, v, q_weight, k_weight, eps, positions, cos_sin, *kv_cache, slot_mapping
    )
    return out
