"""Host side of the warp-specialised forward: its launch configurations as data, and the launches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vexact.ops.kernels.attention.descriptors import describable
from vexact.ops.kernels.attention.hopper.arguments import ROWS, described, head_constants, tiles_and_programs
from vexact.ops.kernels.attention.hopper.boxes import box_height
from vexact.ops.kernels.attention.hopper.counters import new_counter
from vexact.ops.kernels.attention.hopper.forward import forward_kernel
from vexact.ops.kernels.attention.launch import KEY_BLOCKS, Form, key_columns
from vexact.ops.kernels.launches import Call, Launches

BOX_ROWS = 8  # the least rows of a box of keys: those that share a pattern of banks
# Registers of a thread: the warp groups of two consumers and the producer share 504.
REGISTERS = {"CONSUMER_REGISTERS": 232, "PRODUCER_REGISTERS": 40}
BUSY_PRODUCER_REGISTERS = {"CONSUMER_REGISTERS": 224, "PRODUCER_REGISTERS": 56}
_forward = Launches()


@dataclass(frozen=True, slots=True)
class ForwardTile:
    """How the forward walks keys; free of influence on the bits."""

    keys: int  # that travel together: one or two blocks of them
    run_shared: bool  # whether merged chunks stay in shared memory; else there is no room for them
    busy: bool = False  # whether the producer has much to do even with packed rows

    def registers(self, box_rows: int) -> dict[str, int]:
        """Of a program that loads boxes of so many keys."""
        return BUSY_PRODUCER_REGISTERS if self.busy or box_rows < self.keys else REGISTERS


# (element bytes, class of the head dimensions: see HeadShape.key) -> tile
FORWARD_TILES = {
    (2, 64): ForwardTile(128, True),
    (2, 128): ForwardTile(128, True),
    (2, 192): ForwardTile(128, False),
    (2, 256): ForwardTile(64, False, True),
}


def launch_forward(
    heads: Form, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    scale: float, chunk: int, causal: bool,
) -> bool:  # fmt: skip
    """Write `packed_forward` to out and lse; False, and nothing, where an input cannot be described.

    Args:
        heads: `launch.form` of q, k and v. scale: `launch.exponent_scale`. chunk: `launch.chunk_to_merge`.
    """
    once = (cu_seqlens_q,) if cu_seqlens_k is cu_seqlens_q else (cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q, cu_seqlens_k, cu_seqlens_q
    return _launch_forward(heads, (q, k, v, out, lse), lengths, once, scale, chunk, causal, 0, 0)


def launch_paged(
    heads: Form, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor,
    lengths: tuple[Tensor, Tensor, Tensor], scale: float, chunk: int, causal: bool, skip_up_to: int,
) -> bool:  # fmt: skip
    """Write `paged_forward` of the sequences of more than `skip_up_to` query rows to out and lse; False, and nothing,
    where an input cannot be described or a box of keys would be less than 8 rows high.

    Args:
        lengths: cu_seqlens_q, seqused_k, block_table. The others as in `launch_forward`.
    """
    page_size = k_cache.shape[1]
    if page_size % BOX_ROWS:
        return False
    return _launch_forward(
        heads, (q, k_cache, v_cache, out, lse), lengths, lengths, scale, chunk, causal, page_size, skip_up_to
    )


def _launch_forward(
    heads: Form, rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lengths: tuple[Tensor, Tensor, Tensor],
    once: tuple[Tensor, ...], scale: float, chunk: int, causal: bool, page_size: int, skip_up_to: int,
) -> bool:  # fmt: skip
    shape, (q, k, v, out, lse) = heads.shape, rows
    tile = FORWARD_TILES[shape.key]
    tiles, programs = tiles_and_programs(q, lengths[0], shape.num_heads)
    counter = new_counter(q.device)
    run = None if tile.run_shared or not chunk else lse.new_empty((programs, 2, ROWS, shape.value_dim))

    def call() -> Call | None:
        first, rest = key_columns(shape.dim, shape.value_dim)
        widths = first + rest, first + rest, shape.value_dim_pad
        if not all(describable(rows, width) for rows, width in zip((q, k, v), widths, strict=True)):
            return None
        height = box_height(page_size, tile.keys)
        args = (
            described(q, ROWS, first), described(q, ROWS, rest) if rest else None,
            described(k, height, first), described(k, height, rest) if rest else None, described(v, height),
            out, lse, *lengths, counter, run, scale,
            q.shape[0], lengths[0].shape[0] - 1, tiles, lengths[2].stride(0), skip_up_to,
        )  # fmt: skip
        constants = {
            "NUM_HEADS": shape.num_heads, "BLOCK_N": KEY_BLOCKS[shape.key].block_n, "TILE_N": tile.keys,
            "CHUNK": chunk, "D_PAD": first, "PAGE_SIZE": page_size, "RUN_SHARED": tile.run_shared,
            **head_constants(shape, q, k, v, causal), **tile.registers(height),
        }  # fmt: skip
        return Call(forward_kernel, (programs,), args, constants)

    key = heads, tile, lengths[0].shape[0], lengths[2].stride(0), len(once), scale, chunk, causal, skip_up_to
    return _forward(key, (*rows, *once, counter, *(() if run is None else (run,))), call)
