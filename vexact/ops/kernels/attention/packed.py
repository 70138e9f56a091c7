"""Host side of attention over packed sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vexact.ops.kernels.attention.backward import keys_kernel, prepare_kernel, queries_kernel
from vexact.ops.kernels.attention.batch import Batch
from vexact.ops.kernels.attention.descriptors import head_step, row_descriptors
from vexact.ops.kernels.attention.forward import forward_kernel
from vexact.ops.kernels.attention.launch import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    FORWARD_DESCRIBED,
    KEY_BLOCKS,
    KeyBlocks,
    Tile,
    chunk_to_merge,
    exponent_scale,
    form,
    warp_specialised,
)
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import cdiv

PREPARE_ROWS = 32
_forward, _prepare, _queries, _keys = Launches(), Launches(), Launches(), Launches()


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    *,
    tile: Tile | None = None,
    key_blocks: KeyBlocks | None = None,
    specialised: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences laid end to end.

    Args:
        q: (T, Hq, D). k: (Tk, Hkv, D). v: (Tk, Hkv, Dv). fp32, bf16 or fp16; the last dimension is contiguous.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on the device.
        max_seqlen_q: no sequence has more query rows; without influence on the bits. max_seqlen_k: nor more keys.
        tile: launch configuration, free of influence on the bits. key_blocks: decides the bits; for tests and sweeps.
        specialised: whether the kernels of `hopper` run where they can, without influence on the bits either; chosen in
            `launch` if omitted.

    Returns:
        out (T, Hq, Dv) in the dtype of q; lse (T, Hq) fp32, natural log. Rows without visible keys, and rows
        past cu_seqlens_q[-1]: 0 and -inf.

    Raises:
        ValueError: see `form` and `exponent_scale`.
    """
    inputs_form = form(q, k, v)
    shape = inputs_form.shape
    blocks = key_blocks or KEY_BLOCKS[shape.key]
    out = torch.empty((q.shape[0], shape.num_heads, shape.value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.num_heads), dtype=torch.float32, device=q.device)
    num_sequences = cu_seqlens_q.shape[0] - 1
    scale = exponent_scale(softmax_scale)
    if q.shape[0] == 0 or num_sequences == 0:
        return out.zero_(), lse.fill_(-math.inf)
    chunk = chunk_to_merge(blocks, max_seqlen_k)
    batch = Batch(q.shape[0], num_sequences, max_seqlen_q, max_seqlen_k, causal)
    if tile is None and key_blocks is None and warp_specialised("forward", shape, q.device, specialised, batch):
        from vexact.ops.kernels.attention.hopper.host import launch_forward

        if launch_forward(inputs_form, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, chunk, causal):
            return out, lse

    def call() -> Call:
        descriptors = row_descriptors(k, v, blocks.block_n)
        chosen = tile or (FORWARD_DESCRIBED if descriptors else FORWARD)[shape.key]
        num_tiles = q.shape[0] // chosen.block_m + num_sequences + 1
        keys = k, v, *(descriptors or (k, None, v))
        args = (
            q, *keys, out, lse, cu_seqlens_q, cu_seqlens_k, cu_seqlens_q, scale,
            q.shape[0], num_sequences, num_tiles, 0, 0,
            *q.stride()[:2], 0, *k.stride()[:2], 0, *v.stride()[:2],
        )  # fmt: skip
        constants = {
            "NUM_HEADS": shape.num_heads, "GROUP": shape.group, "TILE_HEADS": 1,
            "BLOCK_M": chosen.block_m, "BLOCK_N": blocks.block_n, "CHUNK": chunk,
            "D": shape.dim, "DV": shape.value_dim, "D_PAD": shape.dim_pad, "DV_PAD": shape.value_dim_pad,
            "PAGE_SIZE": 0, "CAUSAL": causal, "DESCRIBED": descriptors is not None,
            "STEP_K": head_step(k), "STEP_V": head_step(v),
            "num_warps": chosen.num_warps, "num_stages": chosen.num_stages,
        }  # fmt: skip
        return Call(forward_kernel, (num_tiles * shape.num_heads,), args, constants)

    own_keys = () if cu_seqlens_k is cu_seqlens_q else (cu_seqlens_k,)
    _forward(
        (inputs_form, num_sequences, scale, causal, chunk, blocks, tile, len(own_keys)),
        (q, k, v, out, lse, cu_seqlens_q, *own_keys),
        call,
    )
    return out, lse


def packed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    *,
    keys_tile: Tile | None = None,
    queries_tile: Tile | None = None,
    specialised: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `packed_forward` by q, k and v, the same bits on every run and for every batch around a sequence.

    Args:
        dout, out: (T, Hq, Dv). lse: (T, Hq) fp32. The others as in the forward.
        keys_tile, queries_tile: launch configurations; unlike in the forward they decide the last bits.
        specialised: as in the forward; the bits are those of the tiles in `launch`.

    Returns:
        dq (T, Hq, D), dk (Tk, Hkv, D), dv (Tk, Hkv, Dv), contiguous, in the dtype of q; rows past the last sequence
        are 0.

    Raises:
        ValueError: see `form` and `exponent_scale`.
    """
    inputs_form = form(q, k, v)
    shape = inputs_form.shape
    untouched = keys_tile is None and queries_tile is None
    keys_tile = keys_tile or BACKWARD_KEYS[shape.key]
    queries_tile = queries_tile or BACKWARD_QUERIES[shape.key]
    scale = exponent_scale(softmax_scale)
    dq, dk, dv = (torch.empty(tensor.shape, dtype=q.dtype, device=q.device) for tensor in (q, k, v))
    num_rows, num_sequences = q.shape[0], cu_seqlens_q.shape[0] - 1
    if num_sequences == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty((shape.num_heads, num_rows), dtype=torch.float32, device=q.device)
    lse2 = torch.empty_like(delta)
    dout, out = dout.contiguous(), out.contiguous()
    own_keys = () if cu_seqlens_k is cu_seqlens_q else (cu_seqlens_k,)
    lengths = cu_seqlens_q, *own_keys
    key = inputs_form, num_sequences, softmax_scale, causal, keys_tile, queries_tile, len(own_keys)
    inputs, ends = (dout, q, k, v, delta, lse2), (cu_seqlens_q, cu_seqlens_k, scale, softmax_scale)
    strides = tuple(tensor.stride(axis) for tensor in (q, k, v) for axis in range(2))

    def constants(tile: Tile) -> dict[str, int]:
        return {
            "NUM_HEADS": shape.num_heads, "GROUP": shape.group, "CAUSAL": causal,
            "D": shape.dim, "DV": shape.value_dim, "D_PAD": shape.dim_pad, "DV_PAD": shape.value_dim_pad,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip

    def prepare() -> Call:
        sizes = {"DV": shape.value_dim, "DV_PAD": shape.value_dim_pad, "ROWS": PREPARE_ROWS}
        grid = (cdiv(num_rows, PREPARE_ROWS) * shape.num_heads,)
        args = dout, out, lse, delta, lse2, num_rows
        return Call(prepare_kernel, grid, args, {"NUM_HEADS": shape.num_heads, **sizes, "num_warps": 4})

    def queries() -> Call:
        num_tiles = num_rows // queries_tile.block_m + num_sequences + 1
        args = *inputs, dq, *ends, num_sequences, num_tiles, num_rows, *strides
        return Call(queries_kernel, (num_tiles * shape.num_heads,), args, constants(queries_tile))

    def keys() -> Call:
        num_tiles = k.shape[0] // keys_tile.block_n + num_sequences + 1
        args = *inputs, dk, dv, *ends, num_sequences, num_tiles, num_rows, k.shape[0], *strides
        return Call(keys_kernel, (num_tiles * shape.num_kv_heads,), args, constants(keys_tile))

    if num_rows:
        _prepare(key, (dout, out, lse, delta, lse2), prepare)
    batch = Batch(num_rows, num_sequences, max_seqlen_q, max_seqlen_k, causal)
    if num_rows and untouched and warp_specialised("backward", shape, q.device, specialised, batch):
        from vexact.ops.kernels.attention.hopper.backward.host import Inputs, launch_backward

        if launch_backward(Inputs(inputs_form, *inputs, *ends, causal), dq, dk, dv):
            return dq, dk, dv
    if num_rows:
        _queries(key, (*inputs, dq, *lengths), queries)
    if k.shape[0]:
        _keys(key, (*inputs, dk, dv, *lengths), keys)
    return dq, dk, dv
