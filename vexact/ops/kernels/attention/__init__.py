"""Triton attention: packed forward and backward, paged forward, key/value cache write."""

from vexact.ops.kernels.attention.kv_write import write_kv
from vexact.ops.kernels.attention.packed import packed_backward, packed_forward
from vexact.ops.kernels.attention.paged import paged_forward

__all__ = ["packed_backward", "packed_forward", "paged_forward", "write_kv"]
