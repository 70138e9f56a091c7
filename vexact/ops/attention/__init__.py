"""Attention with explicit metadata: packed for training, paged for rollout, one online-softmax definition for both."""

from vexact.ops.attention.flash import flash_attn_varlen_func
from vexact.ops.attention.interface import attention, cached_attention, write_kv
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata

__all__ = ["PackedMetadata", "PagedMetadata", "attention", "cached_attention", "flash_attn_varlen_func", "write_kv"]
