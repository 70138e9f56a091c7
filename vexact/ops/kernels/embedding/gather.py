"""Token embedding in Triton: a gather. Its gradient is in grad.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.sizes import cdiv, column_blocks

_forward = Launches()


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


def forward(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``weight`` (V, H) at ``ids`` (T,) -> (T, H); an id outside [0, V) gives a row of NaN."""
    (num_rows, width), num_tokens = weight.shape, ids.shape[0]
    ids, weight = ids.contiguous(), weight.contiguous()
    out = torch.empty((num_tokens, width), dtype=weight.dtype, device=weight.device)

    def call() -> Call:
        config = column_blocks(width)
        grid = num_tokens, cdiv(width, config["BLOCK"])
        return Call(_forward_kernel, grid, (ids, weight, out, num_rows), {"H": width, **config})

    _forward((num_tokens, num_rows, width, ids.dtype, weight.dtype), (ids, weight, out), call)
    return out
