"""Host side of attention over a paged key/value cache: prefill, chunked prefill, decode and any mixture of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from vexact.ops.kernels import chain
from vexact.ops.kernels.attention.batch import Batch
from vexact.ops.kernels.attention.descriptors import Descriptors, head_step, row_descriptors
from vexact.ops.kernels.attention.forward import forward_kernel
from vexact.ops.kernels.attention.launch import (
    DECODE,
    FORWARD,
    FORWARD_DESCRIBED,
    KEY_BLOCKS,
    MAX_DECODE_ROWS,
    Form,
    HeadShape,
    KeyBlocks,
    Tile,
    chunk_to_merge,
    exponent_scale,
    form,
    heads_per_tile,
    padded,
    warp_specialised,
)
from vexact.ops.kernels.attention.split import chunk_kernel, merge_kernel
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps
from vexact.ops.kernels.sizes import cdiv

_tiles, _chunks, _merge = Launches(), Launches(), Launches()


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
    specialised: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over pages. No device memory is read on the host, so a call can be captured in a CUDA
    graph.

    Sequences with few query rows (decode) are cut into chunks that run in parallel; the others walk their chunks in
    order. Both give the same bits.

    Args:
        q: (T, Hq, D). k_cache: (num_pages, page_size, Hkv, D). v_cache: (num_pages, page_size, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32. seqused_k: (B,) int32, keys including those of the new tokens.
        block_table: (B, P) int32; entries past the last page of a sequence are never read as page numbers.
        max_seqlen_q, max_seqlen_k: no sequence of the batch has more query rows, more keys.
        tile, decode_tile, split_rows (the most query rows of a sequence that is cut): free of influence on the bits.
        key_blocks: decides the bits; for tests and sweeps.
        specialised: whether the kernels of `hopper` take sequences of more rows than split_rows where they can, without
            influence on the bits; chosen in `launch` if omitted.

    Returns:
        out (T, Hq, Dv) in the dtype of q; lse (T, Hq) fp32, natural log. Rows without visible keys, and rows past
        cu_seqlens_q[-1]: 0 and -inf.

    Raises:
        ValueError: see `form` and `exponent_scale`.
    """
    inputs_form = form(q, k_cache, v_cache)
    shape = inputs_form.shape
    out = torch.empty((q.shape[0], shape.num_heads, shape.value_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], shape.num_heads), dtype=torch.float32, device=q.device)
    call = _Call(
        q, (k_cache, v_cache), out, lse, (cu_seqlens_q, seqused_k, block_table), max_seqlen_k, inputs_form,
        key_blocks or KEY_BLOCKS[shape.key], exponent_scale(softmax_scale), causal,
    )  # fmt: skip
    if q.shape[0] == 0 or seqused_k.shape[0] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if split_rows is None:
        decode_heads = heads_per_tile(shape.group, MAX_DECODE_ROWS)
        if max_seqlen_q * decode_heads <= MAX_DECODE_ROWS:
            split_rows = max_seqlen_q
        else:
            split_rows = int(may_decode(q.shape[0], seqused_k.shape[0], max_seqlen_q))
    if split_rows > 0:
        call.run_chunks(split_rows, decode_tile or DECODE[shape.key])
    if max_seqlen_q > split_rows:
        batch = Batch(q.shape[0], seqused_k.shape[0], max_seqlen_q, max_seqlen_k, causal, split_rows)
        own = tile is None and key_blocks is None
        if not (own and warp_specialised("paged", shape, q.device, specialised, batch) and call.run_hopper(split_rows)):
            call.run_tiles(split_rows, tile)
    return out, lse


def may_decode(num_rows: int, num_sequences: int, most_rows: int) -> bool:
    """Whether one of the sequences, which own all rows and some each, can have a single row; else no chunks need to be
    launched for it. Only speed depends on it.

    >>> may_decode(700, 2, 512), may_decode(700, 3, 512)
    (False, True)
    """
    return cdiv(num_rows - num_sequences, most_rows - 1) < num_sequences


@dataclass
class _Call:
    """The tensors and constants that the two ways of walking chunks share."""

    q: Tensor
    caches: tuple[Tensor, Tensor]
    out: Tensor
    lse: Tensor
    lengths: tuple[Tensor, Tensor, Tensor]  # cu_seqlens_q, seqused_k, block_table
    max_seqlen_k: int
    form: Form
    blocks: KeyBlocks
    scale: float
    causal: bool

    @property
    def shape(self) -> HeadShape:
        return self.form.shape

    @cached_property
    def descriptors(self) -> Descriptors | None:
        """Descriptors of the caches, where pages can be described."""
        return row_descriptors(*self.caches, self.blocks.block_n)

    @property
    def described(self) -> bool:
        return self.descriptors is not None

    @property
    def keys(self) -> tuple[Any, ...]:
        """What kernels read keys and values from; the caches stand in for descriptors where there are none."""
        k, v = self.caches
        return (k, v, *(self.descriptors or (k, None, v)))

    @property
    def num_sequences(self) -> int:
        return self.lengths[1].shape[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Token and head strides of q; page, slot and head strides of the key cache, then of the value cache."""
        return (*self.q.stride()[:2], *self.caches[0].stride()[:3], *self.caches[1].stride()[:3])

    def constants(self, tile: Tile, tile_heads: int) -> dict[str, Any]:
        shape = self.shape
        return {
            "NUM_HEADS": shape.num_heads, "GROUP": shape.group, "TILE_HEADS": tile_heads,
            "BLOCK_N": self.blocks.block_n, "D": shape.dim, "DV": shape.value_dim,
            "D_PAD": shape.dim_pad, "DV_PAD": shape.value_dim_pad,
            "PAGE_SIZE": self.caches[0].shape[1], "CAUSAL": self.causal,
            "DESCRIBED": self.described,
            "STEP_K": head_step(self.caches[0]), "STEP_V": head_step(self.caches[1]),
            "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        }  # fmt: skip

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What every launch of this call depends on."""
        return (
            *(self.form, self.lengths[2].stride(0), self.num_sequences),
            *(self.blocks.block_n, self.blocks.chunk, self.scale, self.causal),
        )

    def run_hopper(self, skip_up_to: int) -> bool:
        """The same sequences as `run_tiles`, by the kernels for sm_90; False, and nothing, where they cannot."""
        from vexact.ops.kernels.attention.hopper.host import launch_paged

        rows, chunk = (self.q, *self.caches, self.out, self.lse), chunk_to_merge(self.blocks, self.max_seqlen_k)
        return launch_paged(self.form, *rows, self.lengths, self.scale, chunk, self.causal, skip_up_to)

    def run_tiles(self, skip_up_to: int, tile: Tile | None) -> None:
        """Sequences of more than `skip_up_to` query rows, chunks in order."""
        chunk = chunk_to_merge(self.blocks, self.max_seqlen_k)

        def call() -> Call:
            chosen = tile or (FORWARD_DESCRIBED if self.described else FORWARD)[self.shape.key]
            tile_heads = heads_per_tile(self.shape.group, chosen.block_m)
            num_tiles = self.q.shape[0] // (chosen.block_m // tile_heads) + self.num_sequences + 1
            args = (
                self.q, *self.keys, self.out, self.lse, *self.lengths, self.scale,
                self.q.shape[0], self.num_sequences, num_tiles, self.lengths[2].stride(0), skip_up_to, *self.strides,
            )  # fmt: skip
            constants = {"BLOCK_M": chosen.block_m, "CHUNK": chunk, **self.constants(chosen, tile_heads)}
            return Call(forward_kernel, (num_tiles * (self.shape.num_heads // tile_heads),), args, constants)

        tensors = self.q, *self.caches, self.out, self.lse, *self.lengths
        _tiles((self.key, skip_up_to, chunk, tile), tensors, call)

    def run_chunks(self, max_rows: int, tile: Tile) -> None:
        """Sequences of at most `max_rows` query rows, chunks in parallel, then merged where there is more than one."""
        shape, chunk = self.shape, self.blocks.chunk
        num_chunks = max(1, cdiv(self.max_seqlen_k, chunk))
        states: tuple[Tensor, ...]
        if num_chunks > 1:
            parts = self.num_sequences * num_chunks * max_rows, shape.num_heads
            states = self.lse.new_empty((*parts, shape.value_dim)), self.lse.new_empty((*parts, 2))
        else:
            states = (_nothing(self.lse.device),)
        overlap = overlaps(self.q.device)

        def chunks() -> Call:
            tile_heads = heads_per_tile(shape.group, MAX_DECODE_ROWS)
            args = (
                self.q, *self.keys, self.out, self.lse, states[0], states[-1], *self.lengths, self.scale,
                self.q.shape[0], self.num_sequences, num_chunks, self.lengths[2].stride(0), max_rows, *self.strides,
            )  # fmt: skip
            constants = {
                "BLOCK_M": max(tile.block_m, padded(max_rows * tile_heads)), "CHUNK": chunk, "OVERLAP": overlap,
                **self.constants(tile, tile_heads), **chain.options(self.q.shape[0], overlap),
            }  # fmt: skip
            grid = num_chunks * self.num_sequences * (shape.num_heads // tile_heads)
            return Call(chunk_kernel, (grid,), args, constants)

        def merge() -> Call:
            args = self.out, self.lse, *states, *self.lengths[:2], self.scale, num_chunks, max_rows
            constants = {
                "NUM_HEADS": shape.num_heads, "CHUNK": chunk, "DV": shape.value_dim, "DV_PAD": shape.value_dim_pad,
                "OVERLAP": overlap, "num_warps": 4,
                **chain.options(self.q.shape[0], overlap), "launch_pdl": overlap,
            }  # fmt: skip
            return Call(merge_kernel, (self.num_sequences * max_rows * shape.num_heads,), args, constants)

        key = self.key, num_chunks, max_rows, tile
        _chunks(key, (self.q, *self.caches, self.out, self.lse, *states, *self.lengths), chunks)
        if num_chunks > 1:
            _merge(key, (self.out, self.lse, *states, *self.lengths[:2]), merge)


@cache
def _nothing(device: torch.device) -> Tensor:
    """Stands for the states of chunks where there is only one, which has none."""
    return torch.empty(0, dtype=torch.float32, device=device)
