"""What happens to the sums of a grouped tile: one rounding, or SwiGLU of two rounded halves."""

from __future__ import annotations

import triton
import triton.language as tl

from vexact.ops.kernels.swiglu import sigmoid


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """SwiGLU of sums in fp32, each rounded first, as the product that stores them rounds them."""
    gate = gate.to(dtype).to(tl.float32)
    up = up.to(dtype).to(tl.float32)
    return gate * sigmoid(gate) * up


@triton.jit
def store_rows(out_ptr, stride, values, first, end, col, N, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Round and store a (BLOCK_M, WIDTH) tile; places from ``end`` on belong to the next expert."""
    places = first + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, WIDTH)
    ptrs = out_ptr + places.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(ptrs, values.to(out_ptr.dtype.element_ty), mask=(places < end)[:, None] & (cols < N)[None, :])
