"""CPU twin of attention: packed forward and backward, paged forward, key/value cache write."""

from vexact.ops.cpu.attention.backward import packed_backward
from vexact.ops.cpu.attention.forward import packed_forward, paged_forward
from vexact.ops.cpu.attention.kv_write import write_kv

__all__ = ["packed_backward", "packed_forward", "paged_forward", "write_kv"]
