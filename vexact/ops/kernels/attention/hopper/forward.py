"""The warp-specialised forward over packed sequences, and its host side."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vexact.ops.kernels.attention.descriptors import describable, head_step, row_width
from vexact.ops.kernels.attention.hopper.consumer import consume
from vexact.ops.kernels.attention.hopper.producer import produce
from vexact.ops.kernels.attention.hopper.shared import ROWS, allocate
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, chunk_to_merge, exponent_scale, head_shape, padded
from vexact.ops.kernels.linear.launch import multiprocessors

TILE_N = 128  # keys that travel together: one or two blocks
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 40  # of 504 that a thread of each of the three warp groups may share


@gluon.jit(do_not_specialize=["num_rows", "num_sequences", "num_tiles"])
def forward_kernel(
    q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, counter, c, num_rows, num_sequences, num_tiles,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, TILE_N: gl.constexpr, CHUNK: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr,
    STEP_Q: gl.constexpr, STEP_K: gl.constexpr, STEP_V: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of all tiles of 128 query rows, drawn by as many programs as there are multiprocessors.

    q_desc, k_desc, v_desc: (rows, columns) of all heads, STEP columns from head to head, in boxes of 64 query rows and
    of TILE_N keys; out (T, NUM_HEADS, DV) contiguous; lse (T, NUM_HEADS) fp32; counter (1,) int32, 0 at the start.
    CHUNK 0: no sequence has more than one chunk.
    """
    shared = allocate(q_desc, k_desc, v_desc, BLOCK_N, TILE_N, D, DV)
    gl.warp_specialize(
        [
            (consume, (shared, out, lse, c, 0, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, DV, CAUSAL)),
            (consume, (shared, out, lse, c, 1, NUM_HEADS, BLOCK_N, TILE_N, CHUNK, DV, CAUSAL)),
            (
                produce,
                (
                    shared, q_desc, k_desc, v_desc, out, lse, cu_seqlens_q, cu_seqlens_k, counter,
                    num_rows, num_sequences, num_tiles,
                    NUM_HEADS, GROUP, TILE_N, D, DV, CAUSAL, STEP_Q, STEP_K, STEP_V,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _descriptor(rows: Tensor, height: int) -> TensorDescriptor:
    shape, strides = [rows.shape[:-2].numel(), row_width(rows)], [rows.stride(-3), 1]
    return TensorDescriptor(rows, shape, strides, [height, rows.shape[-1]], NVMMASharedLayout(128, 16, rank=2))


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor] | None:
    """`attention.packed_forward` for heads that `launch.warp_specialised` takes, with at least one sequence and one
    query row; None where queries, keys or values cannot be described."""
    shape = head_shape(q, k, v)
    if not all(describable(rows, padded(rows.shape[-1])) for rows in (q, k, v)):
        return None
    blocks = KEY_BLOCKS[shape.key]
    out = torch.empty((q.shape[0], shape.num_heads, shape.value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.num_heads), dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    num_sequences = cu_seqlens_q.shape[0] - 1
    num_tiles = q.shape[0] // (2 * ROWS.value) + num_sequences + 1
    forward_kernel[(min(multiprocessors(q.device), num_tiles * shape.num_heads),)](
        _descriptor(q, ROWS.value), _descriptor(k, TILE_N), _descriptor(v, TILE_N), out, lse,
        cu_seqlens_q, cu_seqlens_k, counter, exponent_scale(softmax_scale), q.shape[0], num_sequences, num_tiles,
        NUM_HEADS=shape.num_heads, GROUP=shape.group, BLOCK_N=blocks.block_n, TILE_N=TILE_N,
        CHUNK=chunk_to_merge(blocks, max_seqlen_k), D=shape.dim, DV=shape.value_dim, CAUSAL=causal,
        STEP_Q=head_step(q), STEP_K=head_step(k), STEP_V=head_step(v),
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out, lse
