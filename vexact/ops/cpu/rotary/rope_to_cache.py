"""CPU twin of rope_to_cache: the twins of its parts."""

from __future__ import annotations

from torch import Tensor

from vexact.ops.cpu.attention import write_kv
from vexact.ops.cpu.rotary import qk_norm_rope, rope


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotated queries (T, Hq, D); keys and values go to the slots."""
    if q_weight is None or k_weight is None:
        q, k = rope.forward(q, k, positions, cos_sin, False)
    else:
        q, k = qk_norm_rope.forward(q, k, q_weight, k_weight, eps, positions, cos_sin)[:2]
    write_kv(k, v, k_cache, v_cache, slot_mapping)
    return q
