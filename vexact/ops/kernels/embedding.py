"""Token embedding in Triton: a gather, and a gradient that adds each row's tokens in order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows in flight while one vocabulary row is summed. They are added one by one, so this does not decide bits.
_UNROLL = 8


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
    UNROLL: tl.constexpr,
):
    first = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < H
    row = tl.load(ids_ptr + first).to(tl.int64)
    previous = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    # One program per distinct id does the work: the one at the start of the id's run.
    if (row != previous) & (row >= 0) & (row < num_rows):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        index = first
        while tl.load(ids_ptr + index, mask=index < num_tokens, other=-1) == row:
            for step in tl.static_range(UNROLL):
                here = index + step
                same = tl.load(ids_ptr + here, mask=here < num_tokens, other=-1) == row
                token = tl.load(order_ptr + here, mask=same, other=0).to(tl.int64)
                total += tl.load(dy_ptr + token * H + columns, mask=in_row & same, other=0.0).to(tl.float32)
            index += UNROLL
        tl.store(out_ptr + row * H + columns, total.to(out_ptr.dtype.element_ty), mask=in_row)


def launch_config(width: int) -> dict[str, int]:
    """Columns per program and its warp count."""
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) -> (T, H); an id outside [0, V) gives a row of NaN."""
    width = weight.shape[1]
    out = torch.empty((ids.shape[0], width), dtype=weight.dtype, device=weight.device)
    config = launch_config(width)
    grid = (ids.shape[0], triton.cdiv(width, config["BLOCK"]))
    _forward_kernel[grid](ids.contiguous(), weight.contiguous(), out, weight.shape[0], H=width, **config)
    return out


def backward(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Gradient (V, H) of the table: per row the fp32 sum of its tokens' ``dy`` in token order, rounded once.

    Args:
        dy: (T, H) contiguous. ids: (T,). num_rows: V. Ids outside [0, V) contribute nothing.
    """
    num_tokens, width = dy.shape
    out = torch.zeros((num_rows, width), dtype=dy.dtype, device=dy.device)
    if num_tokens == 0:
        return out
    sorted_ids, order = torch.sort(ids, stable=True)
    config = launch_config(width)
    grid = (num_tokens, triton.cdiv(width, config["BLOCK"]))
    _backward_kernel[grid](
        dy,
        sorted_ids,
        order,
        out,
        num_tokens,
        num_rows,
        H=width,
        UNROLL=_UNROLL,
        **config,
        enable_fp_fusion=False,
    )
    return out
