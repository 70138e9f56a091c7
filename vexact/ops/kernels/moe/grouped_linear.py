"""Products of rows with the matrix of their expert, launched for the forward and both gradients.

Place p of expert e is multiplied by weight[e]; K is walked in order, so a row has the bits that ``linear`` gives it.
Grids depend on shapes alone, and programs find their work in ``offsets``.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels.chain import overlapping
from vexact.ops.kernels.linear.launch import capability, multiprocessors, overlaps, strip_descriptor
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe.grad_weight import grouped_grad_weight_kernel
from vexact.ops.kernels.moe.places import most_tiles
from vexact.ops.kernels.moe.pointer import grouped_pointer_kernel
from vexact.ops.kernels.moe.tiles import grad_weight_tile, product_tile
from vexact.ops.kernels.moe.tma import grouped_tma_kernel
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

SWIZZLED_SPAN = 128  # bytes of a row that stay together in shared memory


def forward(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    """x (T, K) gathered by ``rows`` (P,), or (P, K); weight (E, N, K) -> (P, N) in the dtype of ``x``."""
    return product(x, weight, rows, offsets, top_k)


def swiglu_forward(x: Tensor, weight: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int) -> Tensor:
    """SwiGLU of :func:`forward` with weight (E, 2I, K) -> (P, I), the same bits without storing (P, 2I)."""
    return product(x, weight, rows, offsets, top_k, gated=True)


def grad_input(dy: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dy (P, N), weight (E, N, K) -> (P, K), place by place."""
    return product(dy, weight.transpose(1, 2), None, offsets, 1)


def grad_weight(
    dy: Tensor, x: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int, *, tile: Tile | None = None
) -> Tensor:
    """dy (P, N), x (T, K) gathered or (P, K) -> (E, N, K) in the dtype of ``x``: places are added in order.

    ``tile`` overrides the table (for tuning and for tests); the bits do not depend on it.
    """
    num_experts, (n, k) = offsets.shape[0] - 1, (dy.shape[1], x.shape[1])
    if dy.shape[0] == 0:
        return x.new_zeros(num_experts, n, k)
    out = x.new_empty(num_experts, n, k)
    if tile is None:
        tile = grad_weight_tile(x.dtype, _has_descriptors(dy, x))
    descriptors = tile.kernel == "tma"
    gather = rows is not None
    grouped_grad_weight_kernel[(num_experts * cdiv(n, tile.block_m) * cdiv(k, tile.block_n),)](
        strip_descriptor(dy, tile.block_k, tile.block_m) if descriptors else dy,
        strip_descriptor(x, tile.block_k, tile.block_n) if descriptors and not gather else x,
        dy,
        x,
        out,
        rows if gather else offsets,
        offsets,
        n,
        k,
        dy.stride(0),
        x.stride(0),
        TOP_K=top_k,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GATHER=gather,
        DESCRIPTORS=descriptors,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # as the launches of linear
    )
    return out


def product(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    top_k: int,
    *,
    gated: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """The rows of ``x`` times the matrices (N, K) of ``weight``, of any strides -> (P, N), or SwiGLU of that.

    ``tile`` overrides the table; the bits do not depend on it.
    """
    num_places = (x if rows is None else rows).shape[0]
    n = weight.shape[1] // 2 if gated else weight.shape[1]
    if num_places == 0 or n == 0:
        return x.new_empty(num_places, n)
    if tile is None:
        descriptors = x.shape[1] > 0 and n % 8 == 0 and _has_descriptors(x) and _whole_matrices(weight, gated)
        tile = product_tile(num_places, weight.shape[0], x.dtype, descriptors, rows is not None, gated)
    launch = _launch_tma if tile.kernel == "tma" else _launch_pointer
    return launch(x, weight, rows, offsets, top_k, num_places, n, gated, tile)


def own_rows(out: Tensor, block_m: int, width: int) -> TensorDescriptor:
    """A descriptor of (P, N), given with ``block_m`` rows in front, that stores the first ``own`` rows of a tile alone.

    Row x + y is addressed by its two coordinates, of which y ends at ``block_m``: a tile that starts at
    x = first + own, y = block_m - own reaches that end after ``own`` rows, and the accelerator drops the others.
    """
    rows, n = out.shape
    return TensorDescriptor(out, [rows - block_m + 1, block_m, n], [n, n, 1], [1, block_m, width])


def matrix_descriptor(weight: Tensor, gated: bool, tile: Tile) -> TensorDescriptor:
    """A descriptor of ``weight`` (E, N, K) in the order it is stored; of gate and up together, (E, 2, N / 2, K)."""
    if gated:
        halves = 2 if _is_joint(weight, tile) else 1
        stored, block = weight.unflatten(1, (2, -1)), [1, halves, tile.block_n, tile.block_k]
    elif weight.stride(2) == 1:
        stored, block = weight, [1, tile.block_n, tile.block_k]
    else:
        stored, block = weight.transpose(1, 2), [1, tile.block_k, tile.block_n]
    return TensorDescriptor(stored, list(stored.shape), list(stored.stride()), block)


def _is_joint(weight: Tensor, tile: Tile) -> bool:
    return tile.block_k * weight.element_size() == SWIZZLED_SPAN


def _has_descriptors(*matrices: Tensor) -> bool:
    """Whether the device has the tensor memory accelerator and it can address rows of ``matrices``."""
    return capability(matrices[0].device)[0] >= 9 and all(
        matrix.stride(1) == 1 and matrix.stride(0) % (16 // matrix.element_size()) == 0 and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )


def _whole_matrices(weight: Tensor, gated: bool) -> bool:
    """Whether ``weight`` (E, N, K), or its transpose unless it is gated, can be addressed by a descriptor."""
    stored = weight if weight.stride(2) == 1 or gated else weight.transpose(1, 2)
    unit = 16 // weight.element_size()
    strides = stored.stride(0), stored.stride(1)
    return stored.stride(2) == 1 and weight.data_ptr() % 16 == 0 and all(s % unit == 0 and s > 0 for s in strides)


def _launch_tma(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    top_k: int,
    num_places: int,
    n: int,
    gated: bool,
    tile: Tile,
) -> Tensor:
    num_experts, k, k_major, gather = weight.shape[0], x.shape[1], weight.stride(2) == 1, rows is not None
    height, width = tile.block_m, tile.block_n // tile.splits
    tiles = most_tiles(num_places, num_experts, height) * cdiv(n, tile.block_n)
    grid = min(tiles, tile.waves * multiprocessors(x.device)) if tile.waves else tiles
    halves, overlap = tile.waves == 0 and height >= 128, height < 128 and overlaps(x.device)
    half = height // 2 if halves else height
    # since sm_100 the sums of gate and up pass through shared memory
    stages = tile.stages - 1 if gated and tile.stages > 3 and capability(x.device)[0] >= 10 else tile.stages
    stored = x.new_empty(height + num_places, n)
    grouped_tma_kernel[(grid,)](
        x if gather else strip_descriptor(x, height, tile.block_k),
        x if gather else strip_descriptor(x, half, tile.block_k),
        matrix_descriptor(weight, gated, tile),
        own_rows(stored, height, width),
        own_rows(stored[height - half :], half, width),
        rows if gather else offsets,
        offsets,
        num_experts,
        n,
        k,
        x.stride(0),
        TOP_K=top_k,
        EXPERTS=next_power_of_2(num_experts),
        BLOCK_M=height,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLITS=tile.splits,
        SWAP=tile.swap,
        FLATTEN=tile.waves > 0,
        HALVES=halves,
        K_MAJOR=k_major,
        EVEN_K=k % tile.block_k == 0,
        GATHER=gather,
        GATED=gated,
        JOINT=gated and _is_joint(weight, tile),
        OVERLAP=overlap,
        num_warps=tile.warps,
        num_stages=stages,
        enable_fp_fusion=True,  # as the launches of linear
        **overlapping(overlap),
    )
    return stored[height:]


def _launch_pointer(
    x: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    top_k: int,
    num_places: int,
    n: int,
    gated: bool,
    tile: Tile,
) -> Tensor:
    num_experts, k = weight.shape[0], x.shape[1]
    out = x.new_empty(num_places, n)
    tiles = most_tiles(num_places, num_experts, tile.block_m) * cdiv(n, tile.block_n)
    grouped_pointer_kernel[(tiles,)](
        x,
        weight,
        out,
        offsets if rows is None else rows,
        offsets,
        num_experts,
        n,
        k,
        *x.stride(),
        *weight.stride(),
        TOP_K=top_k,
        EXPERTS=next_power_of_2(num_experts),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SWAP=tile.swap,
        EVEN_K=k % tile.block_k == 0,
        GATHER=rows is not None,
        GATED=gated,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # as the launches of linear
    )
    return out
