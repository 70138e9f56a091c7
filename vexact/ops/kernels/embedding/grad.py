"""Gradient of the token embedding: a row's tokens are added in a fixed order, without atomics, beside the zero fill.

Nearly all of the time goes into zeros: the output has a row per vocabulary entry, and a batch names few of them. So a
first kernel marks the rows that the batch names. The caller's stream then fills all others with zeros, bound by memory,
while a second stream sorts the tokens by row, bound by latency, and writes the rows that are marked.

A row's tokens are a run of sorted positions, from one to a thousand and more. Runs are cut into segments of a fixed
length, counted from the start of the run, and one program adds each: in fp32, in token order. A run of several segments
has their sums added, in order, by a second kernel. Thus a row's bits depend on its own tokens alone.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.sizes import cdiv, column_blocks

# Tokens that one program adds. Of all numbers here, only this one decides bits: masked additions add zero to a sum that
# starts at +0 and so is never -0.
_SEGMENT = 32
_MARK_BLOCK = 256


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _mark_kernel(
    ids_ptr,  # (T,)
    keys_ptr,  # (T,) int32: the id, or -1 if it is outside the table
    named_ptr,  # (V,) int8, zero: becomes 1 for every row that a token names
    num_tokens,
    num_rows,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token, mask=token < num_tokens, other=-1)
    inside = (row >= 0) & (row < num_rows)
    tl.store(named_ptr + row, 1, mask=inside)
    tl.store(keys_ptr + token, tl.where(inside, row, -1).to(tl.int32), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_rows"])
def _zero_kernel(
    named_ptr,  # (V,)
    out_ptr,  # (V, H)
    num_rows,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    unnamed = tl.load(named_ptr + rows, mask=rows < num_rows, other=1) == 0
    zeros = tl.zeros((ROWS, BLOCK), dtype=out_ptr.dtype.element_ty)
    mask = unnamed[:, None] & (columns < H)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :], zeros, mask=mask)


@triton.jit
def _segment_kernel(
    dy_ptr,  # (T, H)
    keys_ptr,  # (T,) ascending
    order_ptr,  # (T,) token of each key; ascending among equal keys
    starts_ptr,  # (T,) first position of this position's run
    ends_ptr,  # (T,) position after its last
    partials_ptr,  # (2 * cdiv(T, SEGMENT), H) fp32
    out_ptr,  # (V, H)
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEP: tl.constexpr,
):
    first = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < H
    row = tl.load(keys_ptr + first)
    start = tl.load(starts_ptr + first)
    end = tl.load(ends_ptr + first)
    if (row >= 0) & ((first - start) % SEGMENT == 0):
        stop = tl.minimum(end, first + SEGMENT)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        # Unrolled, so that the next rows are on their way while one is added. Software pipelining would hold up the
        # many runs of one token.
        for position in range(first, stop, STEP):
            for step in tl.static_range(STEP):
                here = position + step
                token = tl.load(order_ptr + here, mask=here < stop, other=0)
                value = tl.load(dy_ptr + token * H + columns, mask=in_row & (here < stop), other=0.0)
                total += value.to(tl.float32)
        if end - start <= SEGMENT:
            tl.store(out_ptr + row.to(tl.int64) * H + columns, total.to(out_ptr.dtype.element_ty), mask=in_row)
        else:
            # A window of SEGMENT positions holds the starts of at most two segments of long runs: segments of one run
            # start SEGMENT apart; a long run that starts here reaches past the window, so no other starts after it,
            # and only one run comes in from the window before. Each of the two has its slot.
            slot = 2 * (first // SEGMENT) + (first == start).to(tl.int32)
            tl.store(partials_ptr + slot.to(tl.int64) * H + columns, total, mask=in_row)


@triton.jit(do_not_specialize=["num_tokens"])
def _long_run_kernel(
    partials_ptr,  # (2 * cdiv(T, SEGMENT), H)
    keys_ptr,  # (T,)
    starts_ptr,  # (T,)
    ends_ptr,  # (T,)
    out_ptr,  # (V, H)
    num_tokens,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    window = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < H
    # A run of several segments that starts in this window holds the window's last position.
    last = tl.minimum(window * SEGMENT + SEGMENT, num_tokens) - 1
    row = tl.load(keys_ptr + last)
    start = tl.load(starts_ptr + last)
    end = tl.load(ends_ptr + last)
    if (row >= 0) & (start >= window * SEGMENT) & (end - start > SEGMENT):
        num_segments = tl.cdiv(end - start, SEGMENT)
        total = tl.load(partials_ptr + (2 * window.to(tl.int64) + 1) * H + columns, mask=in_row, other=0.0)
        for segment in tl.range(1, num_segments, num_stages=STAGES):
            slot = 2 * (window + segment).to(tl.int64)
            total += tl.load(partials_ptr + slot * H + columns, mask=in_row, other=0.0)
        tl.store(out_ptr + row.to(tl.int64) * H + columns, total.to(out_ptr.dtype.element_ty), mask=in_row)


def zero_config(width: int) -> dict[str, int]:
    """Rows and columns per program of the fill, and its warp count."""
    return {"ROWS": 4, **column_blocks(width, per_warp=512)}


def segment_config(width: int) -> dict[str, int]:
    """Columns per program, tokens per program and per step, and the warp count."""
    return {"SEGMENT": _SEGMENT, "STEP": 4, **column_blocks(width)}


def long_run_config(width: int) -> dict[str, int]:
    """The same for sums of segments, of which ``STAGES`` are in flight: narrow programs, as few runs are long."""
    return {"SEGMENT": _SEGMENT, "STAGES": 8, **column_blocks(width, widest=512, per_warp=128)}


def _mark(ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(keys: ids as int32 with -1 for any outside the table, named: 1 for each of the rows that has a token)."""
    keys = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    named = torch.zeros(num_rows, dtype=torch.int8, device=ids.device)
    grid = (cdiv(ids.shape[0], _MARK_BLOCK),)
    _mark_kernel[grid](ids.contiguous(), keys, named, ids.shape[0], num_rows, BLOCK=_MARK_BLOCK)
    return keys, named


def _zero_others(named: Tensor, out: Tensor) -> None:
    """Zero the rows of ``out`` that no token names."""
    num_rows, width = out.shape
    config = zero_config(width)
    grid = (cdiv(num_rows, config["ROWS"]), cdiv(width, config["BLOCK"]))
    _zero_kernel[grid](named, out, num_rows, H=width, **config)


def _sort(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ascending keys, the token of each, and the first position of its run and the one after its last)."""
    ascending, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(ascending, ascending, out_int32=True)
    return ascending, order, starts, torch.searchsorted(ascending, ascending, out_int32=True, right=True)


def _sum_runs(dy: Tensor, keys: Tensor, order: Tensor, starts: Tensor, ends: Tensor, out: Tensor) -> None:
    """Write every row of ``out`` that has a token."""
    num_tokens, width = dy.shape
    num_windows = cdiv(num_tokens, _SEGMENT)
    partials = torch.empty((2 * num_windows, width), dtype=torch.float32, device=dy.device)
    config = segment_config(width)
    grid = (num_tokens, cdiv(width, config["BLOCK"]))
    _segment_kernel[grid](dy, keys, order, starts, ends, partials, out, H=width, **config, enable_fp_fusion=False)
    config = long_run_config(width)
    grid = (num_windows, cdiv(width, config["BLOCK"]))
    _long_run_kernel[grid](partials, keys, starts, ends, out, num_tokens, H=width, **config, enable_fp_fusion=False)


def backward(dy: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Gradient (V, H) of the table: per row the fp32 sum of its tokens' ``dy`` in a fixed order, rounded once.

    Args:
        dy: (T, H) contiguous. ids: (T,). num_rows: V. Ids outside [0, V) contribute nothing.
    """
    out = torch.empty((num_rows, dy.shape[1]), dtype=dy.dtype, device=dy.device)
    if dy.shape[0] == 0:
        return out.zero_()
    keys, named = _mark(ids, num_rows)
    if not out.is_cuda:
        _zero_others(named, out)
        _sum_runs(dy, *_sort(keys), out)
        return out
    # Memory of the caller's stream is used on the second only between the two waits. What is allocated on the second
    # is used there alone. The fill is launched first, yet its blocks give way: the second stream has priority.
    main, beside = torch.cuda.current_stream(out.device), _second_stream(out.device)
    beside.wait_stream(main)
    try:
        _zero_others(named, out)
        with torch.cuda.stream(beside):
            _sum_runs(dy, *_sort(keys), out)
    finally:  # also when memory runs out: the caller's memory is about to be used again
        main.wait_stream(beside)
    return out


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
