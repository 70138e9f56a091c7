"""Host side of the warp-specialised backward: its launch configurations as data, and the launches.

No entry of the tables changes a bit: `benchmarks/attention/tune_backward.py` compares and measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vexact.ops.kernels.attention.descriptors import describable
from vexact.ops.kernels.attention.hopper.arguments import ROWS, described, draw_tiles, head_constants
from vexact.ops.kernels.attention.hopper.backward.keys import keys_kernel
from vexact.ops.kernels.attention.hopper.backward.queries import queries_kernel
from vexact.ops.kernels.attention.launch import HeadShape, form, key_columns

Heads = tuple[int, int]  # head dimension, value head dimension


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
    def shape(self) -> HeadShape:
        return form(self.q, self.k, self.v).shape

    def descriptors(self, q_height: int, k_height: int) -> tuple[TensorDescriptor | None, ...]:
        first, rest = key_columns(self.shape.dim, self.shape.value_dim)
        return (
            described(self.q, q_height, first), described(self.q, q_height, rest) if rest else None,
            described(self.k, k_height, first), described(self.k, k_height, rest) if rest else None,
            described(self.v, k_height), described(self.dout, q_height),
        )  # fmt: skip


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse2: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, softmax_scale: float, causal: bool,
) -> bool:  # fmt: skip
    """Write the gradients of `packed_backward`; False, and nothing, where an input cannot be described."""
    if not all(describable(rows, rows.shape[-1]) for rows in (q, k, v, dout)):
        return False
    inputs = Inputs(dout, q, k, v, delta, lse2, cu_seqlens_q, cu_seqlens_k, scale, softmax_scale, causal)
    heads = inputs.shape.dim, inputs.shape.value_dim
    launch_queries(inputs, dq, QUERIES[heads])
    launch_keys(inputs, dk, dv, KEYS[heads])
    return True


def launch_queries(inputs: Inputs, dq: Tensor, walk: Walk) -> None:
    """Write dq (T, Hq, D)."""
    q, k, v, num_heads = inputs.q, inputs.k, inputs.v, inputs.shape.num_heads
    tiles, grid, counter = draw_tiles(q, inputs.cu_seqlens_q, num_heads)
    queries_kernel[grid](
        *inputs.descriptors(ROWS, walk.block), inputs.lse2, inputs.delta, dq, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        counter, inputs.scale, inputs.softmax_scale, q.shape[0], inputs.cu_seqlens_q.shape[0] - 1, tiles,
        NUM_HEADS=num_heads, **head_constants(q, k, v, inputs.causal), **walk.constants,
    )  # fmt: skip


def launch_keys(inputs: Inputs, dk: Tensor, dv: Tensor, walk: Walk) -> None:
    """Write dk (Tk, Hkv, D) and dv (Tk, Hkv, Dv)."""
    # A consumer holds one step and waits for the next, behind those that only the other one sees.
    assert walk.stages >= 2 + max(1, ROWS // walk.block), walk
    q, k, v, num_heads = inputs.q, inputs.k, inputs.v, inputs.shape.num_kv_heads
    tiles, grid, counter = draw_tiles(k, inputs.cu_seqlens_k, num_heads)
    keys_kernel[grid](
        *inputs.descriptors(walk.block, ROWS), inputs.lse2, inputs.delta, dk, dv, inputs.cu_seqlens_q,
        inputs.cu_seqlens_k, counter, inputs.scale, inputs.softmax_scale, q.shape[0], k.shape[0],
        inputs.cu_seqlens_q.shape[0] - 1, tiles,
        KV_HEADS=num_heads, **head_constants(q, k, v, inputs.causal), **walk.constants,
    )  # fmt: skip
