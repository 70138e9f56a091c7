"""Products of rows with the matrix of their expert, launched for the forward and both gradients.

Place p of expert e is multiplied by weight[e]; K is walked in order, so a row has the bits that ``linear`` gives it.
Grids depend on shapes alone, and programs find their work in ``offsets``.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels.chain import overlapping
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.launch import capability, multiprocessors, overlaps, strip_descriptor
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe.grad_weight import grouped_grad_weight_kernel, grouped_grad_weight_sum_kernel
from vexact.ops.kernels.moe.places import most_tiles
from vexact.ops.kernels.moe.pointer import grouped_pointer_kernel
from vexact.ops.kernels.moe.tiles import grad_weight_tile, product_tile
from vexact.ops.kernels.moe.tma import grouped_tma_kernel
from vexact.ops.kernels.sizes import cdiv, next_power_of_2

_products, _grad_weights, _sums = Launches(), Launches(), Launches()

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
    dy: Tensor,
    x: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    top_k: int,
    ranks: int = 1,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """dy (P, N), x (T, K) gathered or (P, K) -> (E, N, K) in the dtype of ``x``: places are added in order.

    With ``ranks`` the places of an expert are those of one rank behind those of another, with an offset for each; each
    gets a gradient of its own, and those of a rank lie together: (ranks * E, N, K), by rank and expert.

    ``tile`` overrides the table (for tuning and for tests); the bits do not depend on it.
    """
    num_experts, (n, k) = offsets.shape[0] - 1, (dy.shape[1], x.shape[1])
    if dy.shape[0] == 0:
        return x.new_zeros(num_experts, n, k)
    out = x.new_empty(num_experts, n, k)
    if tile is None:
        tile = grad_weight_tile(x.dtype, _has_descriptors(dy, x))
    _grad_weights(
        (dy.shape, dy.stride(), x.shape, x.stride(), dy.dtype, x.dtype, num_experts, rows is None, top_k, ranks, tile),
        _once(dy, x, out, rows, offsets),
        lambda: _grad_weight_call(dy, x, out, rows, offsets, top_k, ranks, tile),
    )
    return out


def _grad_weight_call(
    dy: Tensor, x: Tensor, out: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int, ranks: int, tile: Tile
) -> Call:
    (num_experts, n, k), gather, descriptors = out.shape, rows is not None, tile.kernel == "tma"
    args = (
        strip_descriptor(dy, tile.block_k, tile.block_m) if descriptors else dy,
        strip_descriptor(x, tile.block_k, tile.block_n) if descriptors and not gather else x,
        *(dy, x, out, offsets if rows is None else rows, offsets, n, k, dy.stride(0), x.stride(0)),
    )
    constants = {
        **{"TOP_K": top_k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k},
        **{"GATHER": gather, "DESCRIPTORS": descriptors, "RANKS": ranks, "PRECISION": "ieee", **_options(tile)},
    }
    grid = (num_experts * cdiv(n, tile.block_m) * cdiv(k, tile.block_n),)
    return Call(grouped_grad_weight_kernel, grid, args, constants)


def add_grad_weight(
    total: Tensor,
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    ranks: int,
    counted: int,
    fresh: bool,
    *,
    tile: Tile | None = None,
) -> None:
    """Adds what :func:`grad_weight` gives of the first ``counted`` of the ``ranks``, ((total + g0) + g1) + ..., to
    ``total`` (E, N, K) fp32, contiguous, in place; with ``fresh`` its values mean nothing and the sum begins with g0.

    dy (P, N), x (P, K), ``offsets`` (E * ranks + 1,) by expert and rank. ``tile`` as there.
    """
    if dy.shape[0] == 0:
        if fresh:
            total.zero_()
        else:
            total.add_(0.0)  # -0 + 0 is +0, as for an expert without places
        return
    if tile is None:
        tile = grad_weight_tile(x.dtype, _has_descriptors(dy, x), summed=True)
    _sums(
        (dy.shape, dy.stride(), x.shape, x.stride(), dy.dtype, x.dtype, total.shape, ranks, counted, fresh, tile),
        _once(dy, x, total, offsets),
        lambda: _sum_call(total, dy, x, offsets, ranks, counted, fresh, tile),
    )


def _sum_call(
    total: Tensor, dy: Tensor, x: Tensor, offsets: Tensor, ranks: int, counted: int, fresh: bool, tile: Tile
) -> Call:
    (num_experts, n, k), descriptors = total.shape, tile.kernel == "tma"
    args = (
        strip_descriptor(dy, tile.block_k, tile.block_m) if descriptors else dy,
        strip_descriptor(x, tile.block_k, tile.block_n) if descriptors else x,
        *(dy, x, total, offsets, n, k, dy.stride(0), x.stride(0), counted),
    )
    constants = {
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "DESCRIPTORS": descriptors},
        **{"RANKS": ranks, "FRESH": fresh, "PRECISION": "ieee", **_options(tile)},
    }
    grid = (num_experts * cdiv(n, tile.block_m) * cdiv(k, tile.block_n),)
    return Call(grouped_grad_weight_sum_kernel, grid, args, constants)


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
    above = tile.block_m if tile.kernel == "tma" else 0  # rows in front of the first place, see own_rows
    stored = x.new_empty(above + num_places, n)
    half = _half(tile)
    tail = None if half in (0, above) else stored[above - half :]
    kinds = x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), weight.dtype, num_places, rows is None
    make = _tma_call if above else _pointer_call
    _products(
        (*kinds, top_k, gated, tile),
        _once(x, weight, stored, tail, rows, offsets),
        lambda: make(x, weight, stored, rows, offsets, top_k, gated, tile),
    )
    return stored[above:] if above else stored


def _once(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _half(tile: Tile) -> int:
    """Rows of the tile that may end an expert; 0 where nothing is stored by descriptors."""
    if tile.kernel != "tma":
        return 0
    return tile.block_m // 2 if _has_halves(tile) else tile.block_m


def _has_halves(tile: Tile) -> bool:
    return tile.waves == 0 and tile.block_m >= 128


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


def _tma_call(
    x: Tensor, weight: Tensor, stored: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int, gated: bool, tile: Tile
) -> Call:
    """``stored`` (block_m + P, N)."""
    num_experts, k, n, gather = weight.shape[0], x.shape[1], stored.shape[1], rows is not None
    height, half, width = tile.block_m, _half(tile), tile.block_n // tile.splits
    tiles = most_tiles(stored.shape[0] - height, num_experts, height) * cdiv(n, tile.block_n)
    grid = min(tiles, tile.waves * multiprocessors(x.device)) if tile.waves else tiles
    overlap = height < 128 and overlaps(x.device)
    # since sm_100 the sums of gate and up pass through shared memory
    stages = tile.stages - 1 if gated and tile.stages > 3 and capability(x.device)[0] >= 10 else tile.stages
    args = (
        x if gather else strip_descriptor(x, height, tile.block_k),
        x if gather else strip_descriptor(x, half, tile.block_k),
        matrix_descriptor(weight, gated, tile),
        own_rows(stored, height, width),
        own_rows(stored[height - half :], half, width),
        *(offsets if rows is None else rows, offsets, num_experts, n, k, x.stride(0)),
    )
    constants = {
        **{"TOP_K": top_k, "EXPERTS": next_power_of_2(num_experts), "BLOCK_M": height, "BLOCK_N": tile.block_n},
        **{"BLOCK_K": tile.block_k, "SPLITS": tile.splits, "SWAP": tile.swap, "FLATTEN": tile.waves > 0},
        **{"HALVES": _has_halves(tile), "K_MAJOR": weight.stride(2) == 1, "EVEN_K": k % tile.block_k == 0},
        **{"GATHER": gather, "GATED": gated, "JOINT": gated and _is_joint(weight, tile), "OVERLAP": overlap},
        **(_options(tile) | {"num_stages": stages} | overlapping(overlap)),
    }
    return Call(grouped_tma_kernel, (grid,), args, constants)


def _pointer_call(
    x: Tensor, weight: Tensor, out: Tensor, rows: Tensor | None, offsets: Tensor, top_k: int, gated: bool, tile: Tile
) -> Call:
    """``out`` (P, N)."""
    num_experts, k, (num_places, n) = weight.shape[0], x.shape[1], out.shape
    args = (
        *(x, weight, out, offsets if rows is None else rows, offsets, num_experts, n, k),
        *(*x.stride(), *weight.stride()),
    )
    constants = {
        **{"TOP_K": top_k, "EXPERTS": next_power_of_2(num_experts), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        **{"BLOCK_K": tile.block_k, "SWAP": tile.swap, "EVEN_K": k % tile.block_k == 0, "GATHER": rows is not None},
        **{"GATED": gated, "PRECISION": "ieee", **_options(tile)},
    }
    grid = (most_tiles(num_places, num_experts, tile.block_m) * cdiv(n, tile.block_n),)
    return Call(grouped_pointer_kernel, grid, args, constants)


def _options(tile: Tile) -> dict[str, int]:
    # as the launches of linear: the default of contraction differs between releases
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
