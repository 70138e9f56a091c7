"""Host side of the warp-specialised kernels: what they read is described here, and how many programs run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vexact.ops.kernels.attention.descriptors import describable, head_step, row_width
from vexact.ops.kernels.attention.hopper.backward_keys import keys_kernel
from vexact.ops.kernels.attention.hopper.backward_queries import queries_kernel
from vexact.ops.kernels.attention.hopper.forward import forward_kernel
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, form, padded
from vexact.ops.kernels.linear.launch import multiprocessors

ROWS = 64  # query rows, or keys, of a consumer: two make a tile
KEYS_AT_ONCE = 128  # keys that travel together in the forward: one or two blocks of them
BACKWARD_STAGES = 4  # tiles of 64 query rows, or keys, that a program of the backward holds at a time
# Registers of a thread: the warp groups of two consumers and the producer share 504.
REGISTERS = {"CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40}
BACKWARD_KEYS_REGISTERS = {"CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, chunk: int, causal: bool,
) -> bool:  # fmt: skip
    """Write `packed_forward` to out and lse; False, and nothing, where an input cannot be described.

    Args:
        scale: `launch.exponent_scale`. chunk: `launch.chunk_to_merge`.
    """
    if not _all_describable(q, k, v):
        return False
    shape = form(q, k, v).shape
    tiles, grid, counter = _tiles(q, cu_seqlens_q, shape.num_heads)
    forward_kernel[grid](
        _described(q, ROWS), _described(k, KEYS_AT_ONCE), _described(v, KEYS_AT_ONCE), out, lse,
        cu_seqlens_q, cu_seqlens_k, counter, scale, q.shape[0], cu_seqlens_q.shape[0] - 1, tiles,
        NUM_HEADS=shape.num_heads, BLOCK_N=KEY_BLOCKS[shape.key].block_n, TILE_N=KEYS_AT_ONCE, CHUNK=chunk,
        **_constants(q, k, v, causal), **REGISTERS,
    )  # fmt: skip
    return True


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse2: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, softmax_scale: float, causal: bool,
) -> bool:  # fmt: skip
    """Write the gradients of `packed_backward`; False, and nothing, where an input cannot be described.

    Args:
        dout: (T, Hq, Dv) contiguous. delta, lse2: (Hq, T) fp32 of `backward.prepare_kernel`.
    """
    if not _all_describable(q, k, v, dout):
        return False
    shape = form(q, k, v).shape
    constants = {**_constants(q, k, v, causal), "STAGES": BACKWARD_STAGES}
    num_sequences = cu_seqlens_q.shape[0] - 1
    described = tuple(_described(rows, ROWS) for rows in (q, k, v, dout))
    tiles, grid, counter = _tiles(q, cu_seqlens_q, shape.num_heads)
    queries_kernel[grid](
        *described, lse2, delta, dq, cu_seqlens_q, cu_seqlens_k, counter, scale, softmax_scale,
        q.shape[0], num_sequences, tiles, NUM_HEADS=shape.num_heads, BLOCK_N=ROWS, **constants, **REGISTERS,
    )  # fmt: skip
    tiles, grid, counter = _tiles(k, cu_seqlens_k, shape.num_kv_heads)
    keys_kernel[grid](
        *described, lse2, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, counter, scale, softmax_scale,
        q.shape[0], k.shape[0], num_sequences, tiles, KV_HEADS=shape.num_kv_heads,
        **constants, **BACKWARD_KEYS_REGISTERS,
    )  # fmt: skip
    return True


def _all_describable(*tensors: Tensor) -> bool:
    return all(describable(rows, padded(rows.shape[-1])) for rows in tensors)


def _described(rows: Tensor, height: int) -> TensorDescriptor:
    shape, strides = [rows.shape[0], row_width(rows)], [rows.stride(0), 1]
    return TensorDescriptor(rows, shape, strides, [height, rows.shape[-1]], NVMMASharedLayout(128, 16, rank=2))


def _tiles(rows: Tensor, cu_seqlens: Tensor, heads: int) -> tuple[int, tuple[int], Tensor]:
    """Tiles of 128 rows at most, a grid that draws them for all heads, and the counter it draws from."""
    tiles = rows.shape[0] // (2 * ROWS) + cu_seqlens.shape[0]
    counter = torch.zeros(1, dtype=torch.int32, device=rows.device)
    return tiles, (min(multiprocessors(rows.device), tiles * heads),), counter


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    shape = form(q, k, v).shape
    return {
        "GROUP": shape.group, "D": shape.dim, "DV": shape.value_dim, "CAUSAL": causal,
        "STEP_Q": head_step(q), "STEP_K": head_step(k), "STEP_V": head_step(v), "num_warps": 4,
    }  # fmt: skip
