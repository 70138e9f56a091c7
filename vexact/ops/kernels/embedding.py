"""Token embedding in Triton: a gather, and a gradient that adds each row's tokens in a fixed order, without atomics."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.sizes import cdiv, next_power_of_2

# The first rows of a vocabulary entry are added one by one, further ones in tiles whose rows are in flight at once: the
# most frequent tokens of a batch occur a thousand times. Both numbers decide bits.
_SINGLE = 4
_TILE = 32


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    ids_ptr,  # (T,)
    weight_ptr,  # (V, H)
    out_ptr,  # (T, H)
    num_rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    # An id outside the vocabulary gives NaN, which every later check sees, instead of memory that is not the table's.
    valid = (row >= 0) & (row < num_rows)
    value = tl.load(weight_ptr + row * H + columns, mask=(columns < H) & valid, other=float("nan"))
    tl.store(out_ptr + token * H + columns, value, mask=columns < H)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _backward_kernel(
    dy_ptr,  # (T, H)
    ids_ptr,  # (T,) ascending
    order_ptr,  # (T,) token of each sorted id; ascending among equal ids
    out_ptr,  # (V, H), zero
    num_tokens,
    num_rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SINGLE: tl.constexpr,
    TILE: tl.constexpr,
):
    first = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < H
    row = tl.load(ids_ptr + first)
    previous = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    # One program per distinct id does the work: the one at the start of the id's run.
    if (row != previous) & (row >= 0) & (row < num_rows):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for step in tl.static_range(SINGLE):
            here = first + step
            same = tl.load(ids_ptr + here, mask=here < num_tokens, other=-1) == row
            token = tl.load(order_ptr + here, mask=same, other=0)
            total += tl.load(dy_ptr + token * H + columns, mask=in_row & same, other=0.0).to(tl.float32)
        places = first + SINGLE + tl.arange(0, TILE)
        more = tl.load(ids_ptr + first + SINGLE, mask=first + SINGLE < num_tokens, other=-1) == row
        while more:
            in_run = tl.load(ids_ptr + places, mask=places < num_tokens, other=-1) == row
            tokens = tl.load(order_ptr + places, mask=places < num_tokens, other=0)
            mask = in_run[:, None] & in_row[None, :]
            tile = tl.load(dy_ptr + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0)
            total += tl.sum(tile.to(tl.float32), 0)
            more = tl.sum(in_run.to(tl.int32), 0) == TILE
            places += TILE
        tl.store(out_ptr + row.to(tl.int64) * H + columns, total.to(out_ptr.dtype.element_ty), mask=in_row)


def launch_config(width: int) -> dict[str, int]:
    """Columns per program and its warp count."""
    block = min(2048, next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def backward_config(width: int) -> dict[str, int]:
    """The same for the gradient: narrow programs, so that many rows of a frequent token are in flight."""
    block = min(512, next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 128)}


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) -> (T, H); an id outside [0, V) gives a row of NaN."""
    width = weight.shape[1]
    out = torch.empty((ids.shape[0], width), dtype=weight.dtype, device=weight.device)
    config = launch_config(width)
    grid = (ids.shape[0], cdiv(width, config["BLOCK"]))
    _forward_kernel[grid](ids.contiguous(), weight.contiguous(), out, weight.shape[0], H=width, **config)
    return out


def _sort_beside_zeros(ids: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``out`` with zeros, and meanwhile sort ``ids``: (ascending ids int32, token of each).

    The fill is bound by memory and the sort by latency, so they overlap; the sort has a stream of higher priority,
    or it would wait for a free multiprocessor. Its results may be used, and freed, on the stream of the caller: what
    runs next on the second stream waits for the caller's first.
    """

    def sort() -> tuple[Tensor, Tensor]:
        # An id outside the vocabulary stays outside when it is narrowed.
        return torch.sort(ids.clamp(-1, out.shape[0]).to(torch.int32), stable=True)

    if not out.is_cuda:
        out.zero_()
        return sort()
    main, beside = torch.cuda.current_stream(out.device), _second_stream(out.device)
    beside.wait_stream(main)
    with torch.cuda.stream(beside):
        result = sort()
    out.zero_()
    main.wait_stream(beside)
    return result


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def backward(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Gradient (V, H) of the table: per row the fp32 sum of its tokens' ``dy`` in a fixed order, rounded once.

    Args:
        dy: (T, H) contiguous. ids: (T,). num_rows: V. Ids outside [0, V) contribute nothing.
    """
    num_tokens, width = dy.shape
    out = torch.empty((num_rows, width), dtype=dy.dtype, device=dy.device)
    if num_tokens == 0:
        return out.zero_()
    sorted_ids, order = _sort_beside_zeros(ids, out)
    config = backward_config(width)
    grid = (num_tokens, cdiv(width, config["BLOCK"]))
    _backward_kernel[grid](
        dy,
        sorted_ids,
        order,
        out,
        num_tokens,
        num_rows,
        H=width,
        SINGLE=_SINGLE,
        TILE=_TILE,
        **config,
        enable_fp_fusion=False,
    )
    return out
