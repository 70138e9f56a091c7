"""Host side of attention over a paged key/value cache: prefill, chunked prefill, decode and any mixture of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vexact.ops.kernels.attention.forward import forward_kernel
from vexact.ops.kernels.attention.launch import (
    DECODE,
    FORWARD,
    KEY_BLOCKS,
    MAX_DECODE_ROWS,
    HeadShape,
    KeyBlocks,
    Tile,
    chunk_to_merge,
    exponent_scale,
    head_shape,
    heads_per_tile,
    padded,
)
from vexact.ops.kernels.attention.split import chunk_kernel, merge_kernel


def paged_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    *,
    tile: Tile | None = None,
    decode_tile: Tile | None = None,
    key_blocks: KeyBlocks | None = None,
    split_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over pages. No device memory is read on the host, so a call can be captured in a CUDA graph.

    Sequences with few query rows (decode) are cut into chunks that run in parallel; the others walk their chunks in order.
    Both give the same bits.

    Args:
        q: (T, Hq, D). k_cache: (num_pages, page_size, Hkv, D). v_cache: (num_pages, page_size, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32. seqused_k: (B,) int32, keys including those of the new tokens.
        block_table: (B, P) int32; entries past the last page of a sequence are never read as page numbers.
        max_seqlen_q, max_seqlen_k: no sequence of the batch has more query rows, more keys.
        tile, decode_tile, split_rows (the most query rows of a sequence that is cut): free of influence on the bits.
        key_blocks: decides the bits; for tests and sweeps.

    Returns:
        out (T, Hq, Dv) in the dtype of q; lse (T, Hq) fp32, natural log. Rows without visible keys: 0 and -inf. Rows past
        cu_seqlens_q[-1] are not written.

    Raises:
        ValueError: see `head_shape` and `exponent_scale`.
    """
    shape = head_shape(q, k_cache, v_cache)
    blocks = key_blocks or KEY_BLOCKS[shape.key]
    out = torch.empty((q.shape[0], shape.num_heads, shape.value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.num_heads), dtype=torch.float32, device=q.device)
    scale = exponent_scale(softmax_scale)
    if q.shape[0] == 0 or seqused_k.shape[0] == 0:
        return out, lse
    decode_heads = heads_per_tile(shape.group, MAX_DECODE_ROWS)
    if split_rows is None:
        split_rows = max_seqlen_q if max_seqlen_q * decode_heads <= MAX_DECODE_ROWS else 1
    lengths = (cu_seqlens_q, seqused_k, block_table)
    caches = (k_cache, v_cache)
    if split_rows > 0:
        decode = decode_tile or DECODE[shape.key]
        _run_chunks(q, caches, out, lse, lengths, scale, max_seqlen_k, split_rows, shape, decode, blocks, causal)
    if max_seqlen_q > split_rows:
        _run_tiles(q, caches, out, lse, lengths, scale, max_seqlen_k, split_rows, shape, tile, blocks, causal)
    return out, lse


def _cache_strides(caches: tuple[Tensor, Tensor]) -> tuple[int, ...]:
    """Page, slot and head strides of the key cache, then of the value cache."""
    return tuple(cache.stride(axis) for cache in caches for axis in range(3))


def _constants(shape: HeadShape, blocks: KeyBlocks, page_size: int, causal: bool) -> dict[str, Any]:
    return dict(
        NUM_HEADS=shape.num_heads, GROUP=shape.group, BLOCK_N=blocks.block_n,
        D=shape.dim, DV=shape.value_dim, D_PAD=shape.dim_pad, DV_PAD=shape.value_dim_pad,
        PAGE_SIZE=page_size, CAUSAL=causal,
    )  # fmt: skip


def _run_tiles(
    q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, lengths: tuple[Tensor, Tensor, Tensor],
    scale: float, max_seqlen_k: int, split_rows: int, shape: HeadShape, tile: Tile | None, blocks: KeyBlocks, causal: bool,
) -> None:  # fmt: skip
    """Sequences of more than `split_rows` query rows, chunks in order."""
    tile = tile or FORWARD[shape.key]
    tile_heads = heads_per_tile(shape.group, tile.block_m)
    num_sequences = lengths[1].shape[0]
    num_tiles = q.shape[0] // (tile.block_m // tile_heads) + num_sequences
    forward_kernel[(num_tiles * (shape.num_heads // tile_heads),)](
        q, *caches, out, lse, *lengths, scale,
        num_sequences, num_tiles, lengths[2].stride(0), split_rows,
        q.stride(0), q.stride(1), *_cache_strides(caches),
        TILE_HEADS=tile_heads, BLOCK_M=tile.block_m, CHUNK=chunk_to_merge(blocks, max_seqlen_k),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **_constants(shape, blocks, caches[0].shape[1], causal),
    )  # fmt: skip


def _run_chunks(
    q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor, lse: Tensor, lengths: tuple[Tensor, Tensor, Tensor],
    scale: float, max_seqlen_k: int, max_rows: int, shape: HeadShape, tile: Tile, blocks: KeyBlocks, causal: bool,
) -> None:  # fmt: skip
    """Sequences of at most `max_rows` query rows, chunks in parallel, then merged where there is more than one."""
    tile_heads = heads_per_tile(shape.group, MAX_DECODE_ROWS)
    block_m = max(tile.block_m, padded(max_rows * tile_heads))
    num_sequences = lengths[1].shape[0]
    num_chunks = max(1, -(-max_seqlen_k // blocks.chunk))
    parts = (num_sequences * num_chunks * max_rows if num_chunks > 1 else 0, shape.num_heads)
    part_acc = torch.empty((*parts, shape.value_dim), dtype=torch.float32, device=q.device)
    part_ml = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
    chunk_kernel[(num_chunks * num_sequences * (shape.num_heads // tile_heads),)](
        q, *caches, out, lse, part_acc, part_ml, *lengths, scale,
        num_sequences, num_chunks, lengths[2].stride(0), max_rows,
        q.stride(0), q.stride(1), *_cache_strides(caches),
        TILE_HEADS=tile_heads, BLOCK_M=block_m, CHUNK=blocks.chunk, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **_constants(shape, blocks, caches[0].shape[1], causal),
    )  # fmt: skip
    if num_chunks > 1:
        merge_kernel[(num_sequences * max_rows * shape.num_heads,)](
            out, lse, part_acc, part_ml, lengths[0], lengths[1], scale, num_chunks, max_rows,
            NUM_HEADS=shape.num_heads, CHUNK=blocks.chunk, DV=shape.value_dim, DV_PAD=shape.value_dim_pad, num_warps=4,
        )  # fmt: skip
