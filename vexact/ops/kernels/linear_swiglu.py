"""SwiGLU of a product with the fused projections [gate | up], without storing the product: what decoding does.

A tile has as many columns of the gate as of the up projection. Their sums walk K as ``linear`` does, each is rounded
as ``linear`` rounds it, and the epilogue does what ``swiglu`` does: the bits are those of the two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels import chain, linear, swiglu
from vexact.ops.kernels.chain import follow
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import overlaps, strip_descriptor, use_descriptors
from vexact.ops.kernels.linear.pointer import tile_coordinates
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.linear.tma import halves
from vexact.ops.kernels.moe.epilogue import gated
from vexact.ops.kernels.sizes import cdiv

_launches = Launches()
SWIZZLED_SPAN = 128  # bytes of a row that stay together in shared memory: so deep, both halves of a block are one piece
# (most rows, tile): block_n counts columns of the result. More rows than the last bound take the two kernels.
TILES: tuple[tuple[int, Tile], ...] = (
    (16, Tile("tma", 16, 32, 64, 4, 6, swap=True)),
    (32, Tile("tma", 32, 32, 64, 4, 6, swap=True)),
    (128, Tile("tma", 64, 32, 64, 4, 6)),
    (256, Tile("tma", 64, 64, 64, 4, 6)),
)


@triton.jit
def add_products(x, w, acc, SWAP: tl.constexpr):
    """acc + x @ wᵀ, or its transpose when SWAP."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc)
    else:
        return tl.dot(x, tl.trans(w), acc)


@triton.jit(do_not_specialize=["M", "N", "K"])
def linear_swiglu_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (2, N, K): gate, then up
    out_desc,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    JOINT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """out = swiglu(x weightᵀ), one tile a program.

    SWAP is that of ``matmul_tma_kernel``, CHAINED: see ``chain``. JOINT multiplies with gate and up as one tile of
    twice the width.
    """
    COLUMNS: tl.constexpr = 2 * BLOCK_N if JOINT else BLOCK_N
    tile_m, tile_n = tile_coordinates(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    follow(CHAINED)
    if SWAP:
        acc = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    if not JOINT:
        acc_up = acc
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        w = tl.reshape(weight_desc.load([0, col, k]), (COLUMNS, BLOCK_K))
        x = x_desc.load([row, k])
        acc = add_products(x, w, acc, SWAP)
        if not JOINT:
            up = tl.reshape(weight_desc.load([1, col, k]), (COLUMNS, BLOCK_K))
            acc_up = add_products(x, up, acc_up, SWAP)
    if JOINT:
        if SWAP:
            acc = tl.trans(acc)
        gate_sums, up_sums = halves(acc)
        out = gated(gate_sums, up_sums, out_desc.dtype)
    else:
        out = gated(acc, acc_up, out_desc.dtype)
        if SWAP:
            out = tl.trans(out)
    out_desc.store([row, col], out.to(out_desc.dtype))


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (2I, K) -> SwiGLU of their product (M, I), in one launch or in two; see ``chain``."""
    rows = x.shape[0]
    if chain.of(rows).fuse and 0 < rows <= TILES[-1][0] and fits(x, weight):
        return product(x, weight, next(tile for bound, tile in TILES if rows <= bound))
    return swiglu.forward(linear.forward(x, weight, None, x.dtype))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the accelerator of this device can address the operands and the result."""
    width = weight.shape[0] // 2
    half_precision = x.element_size() == 2  # fp32 products have tiles of their own
    return half_precision and width % 8 == 0 and weight.stride(1) == 1 == x.stride(1) and use_descriptors(x, weight)


def product(x: Tensor, weight: Tensor, tile: Tile) -> Tensor:
    """The one launch, for operands of which ``fits`` is true. The bits do not depend on ``tile``."""
    rows, width = x.shape[0], weight.shape[0] // 2
    out = x.new_empty((rows, width))
    key = rows, weight.shape, x.stride(), weight.stride(), x.dtype, tile
    _launches(key, (x, weight, out), lambda: _call(x, weight, out, tile))
    return out


def _call(x: Tensor, weight: Tensor, out: Tensor, tile: Tile) -> Call:
    (rows, depth), width = x.shape, out.shape[1]
    joint = tile.block_k * weight.element_size() == SWIZZLED_SPAN
    both = weight.unflatten(0, (2, width))
    block = [2 if joint else 1, tile.block_n, tile.block_k]
    args = (
        strip_descriptor(x, tile.block_m, tile.block_k),
        TensorDescriptor(both, list(both.shape), list(both.stride()), block),
        strip_descriptor(out, tile.block_m, tile.block_n),
        *(rows, width, depth),
    )
    constants = {
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m},
        **{"SWAP": tile.swap, "JOINT": joint, **chain.options(rows, overlaps(x.device))},
        **{"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},  # as the launches of linear
    }
    grid = cdiv(rows, tile.block_m) * cdiv(width, tile.block_n)
    return Call(linear_swiglu_kernel, (grid,), args, constants)
