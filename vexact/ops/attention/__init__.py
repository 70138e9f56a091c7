"""Attention with explicit metadata: packed for training, paged for rollout, one online-softmax definition for both."""

from vexact.ops.attention.interface import attention, write_kv
from vexact.ops.attention.metadata import PackedMetadata, PagedMetadata

__all__ = ["PackedMetadata", "PagedMetadata", "attention", "write_kv"]
