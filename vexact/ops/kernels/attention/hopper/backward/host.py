"""Host side of the warp-specialised backward: its launch configurations as data, and the launches.

No entry of the tables changes a bit: `benchmarks/attention/tune_backward.py` compares and measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vexact.ops.kernels.attention.descriptors import describable
from vexact.ops.kernels.attention.hopper.arguments import ROWS, described, head_constants, tiles_and_programs
from vexact.ops.kernels.attention.hopper.backward.keys import keys_kernel
from vexact.ops.kernels.attention.hopper.backward.queries import queries_kernel
from vexact.ops.kernels.attention.hopper.counters import new_counter
from vexact.ops.kernels.attention.launch import Form, key_columns
from vexact.ops.kernels.launches import Call, Launches

Heads = tuple[int, int]  # head dimension, value head dimension
_queries, _keys = Launches(), Launches()


@dataclass(frozen=True, slots=True)
class Walk:
    """How a kernel of the backward walks the rows on the other side of its tiles."""

    block: int  # rows of a step
    stages: int  # steps held in shared memory at a time
    ahead: bool = True  # whether the next step's scores start behind the sums of this one rather than after them
    # Registers of a thread: the warp groups of two consumers and of the producer share 504.
    consumer_registers: int = 232
    producer_registers: int = 40

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "BLOCK": self.block, "STAGES": self.stages, "AHEAD": self.ahead,
            "CONSUMER_REGISTERS": self.consumer_registers, "PRODUCER_REGISTERS": self.producer_registers,
        }  # fmt: skip


# Keys of a step of the kernel that owns queries.
QUERIES: dict[Heads, Walk] = {
    (64, 64): Walk(128, 4),
    (128, 128): Walk(64, 3),
    (192, 128): Walk(64, 3),
}
# Query rows of a step of the kernel that owns keys, which has two sums to hold.
KEYS: dict[Heads, Walk] = {
    (64, 64): Walk(64, 6),
    (128, 128): Walk(64, 3, True, 240, 24),
    (192, 128): Walk(32, 6, True, 240, 24),
}


class Inputs(NamedTuple):
    """Those of `packed_backward`; dout contiguous, delta and lse2 (Hq, T) fp32 of `backward.prepare_kernel`."""

    heads: Form  # of q, k and v
    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    delta: Tensor
    lse2: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    scale: float
    softmax_scale: float
    causal: bool

    @property
    def described(self) -> bool:
        """Whether rows can travel in boxes."""
        return all(describable(rows, rows.shape[-1]) for rows in (self.q, self.k, self.v, self.dout))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each once."""
        own_keys = () if self.cu_seqlens_k is self.cu_seqlens_q else (self.cu_seqlens_k,)
        return self.dout, self.q, self.k, self.v, self.delta, self.lse2, self.cu_seqlens_q, *own_keys

    @property
    def key(self) -> tuple[Any, ...]:
        """What both launches depend on beside where tensors lie."""
        same_lengths = self.cu_seqlens_k is self.cu_seqlens_q
        return self.heads, self.cu_seqlens_q.shape[0], same_lengths, self.scale, self.softmax_scale, self.causal

    def descriptors(self, q_height: int, k_height: int) -> tuple[TensorDescriptor | None, ...]:
        first, rest = key_columns(self.heads.shape.dim, self.heads.shape.value_dim)
        return (
            described(self.q, q_height, first), described(self.q, q_height, rest) if rest else None,
            described(self.k, k_height, first), described(self.k, k_height, rest) if rest else None,
            described(self.v, k_height), described(self.dout, q_height),
        )  # fmt: skip

    def constants(self, walk: Walk) -> dict[str, Any]:
        return head_constants(self.heads.shape, self.q, self.k, self.v, self.causal) | walk.constants


def launch_backward(inputs: Inputs, dq: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """Write the gradients of `packed_backward`; False, and nothing, where an input cannot be described."""
    heads = inputs.heads.shape.dim, inputs.heads.shape.value_dim
    return launch_queries(inputs, dq, QUERIES[heads]) and launch_keys(inputs, dk, dv, KEYS[heads])


def launch_queries(inputs: Inputs, dq: Tensor, walk: Walk) -> bool:
    """Write dq (T, Hq, D); False, and nothing, where an input cannot be described."""
    num_heads, lengths = inputs.heads.shape.num_heads, (inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    counter = new_counter(dq.device)

    def call() -> Call | None:
        if not inputs.described:
            return None
        tiles, programs = tiles_and_programs(inputs.q, inputs.cu_seqlens_q, num_heads)
        args = (
            *inputs.descriptors(ROWS, walk.block), inputs.lse2, inputs.delta, dq, *lengths, counter,
            inputs.scale, inputs.softmax_scale, inputs.q.shape[0], inputs.cu_seqlens_q.shape[0] - 1, tiles,
        )  # fmt: skip
        return Call(queries_kernel, (programs,), args, {"NUM_HEADS": num_heads, **inputs.constants(walk)})

    return _queries((inputs.key, walk), (*inputs.tensors, dq, counter), call)


def launch_keys(inputs: Inputs, dk: Tensor, dv: Tensor, walk: Walk) -> bool:
    """Write dk (Tk, Hkv, D) and dv (Tk, Hkv, Dv); False, and nothing, where an input cannot be described."""
    # A consumer holds one step and waits for the next, behind those that only the other one sees.
    assert walk.stages >= 2 + max(1, ROWS // walk.block), walk
    num_heads, lengths = inputs.heads.shape.num_kv_heads, (inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    counter = new_counter(dk.device)

    def call() -> Call | None:
        if not inputs.described:
            return None
        tiles, programs = tiles_and_programs(inputs.k, inputs.cu_seqlens_k, num_heads)
        args = (
            *inputs.descriptors(walk.block, ROWS), inputs.lse2, inputs.delta, dk, dv, *lengths, counter,
            inputs.scale, inputs.softmax_scale, inputs.q.shape[0], inputs.k.shape[0],
            inputs.cu_seqlens_q.shape[0] - 1, tiles,
        )  # fmt: skip
        return Call(keys_kernel, (programs,), args, {"KV_HEADS": num_heads, **inputs.constants(walk)})

    return _keys((inputs.key, walk), (*inputs.tensors, dk, dv, counter), call)
