"""Scatter of new keys and values into the pages of a cache."""

from __future__ import annotations

from torch import Tensor

from vexact.ops.checks import out_of_range


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes (T, Hkv, D) to slots page*page_size + offset; negative slots are skipped."""
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    try:
        k_cache.flatten(0, 1)[slots] = k[keep]
        v_cache.flatten(0, 1)[slots] = v[keep]
    except IndexError:
        raise out_of_range("write_kv", "slot_mapping", slots, k_cache.shape[0] * k_cache.shape[1]) from None
