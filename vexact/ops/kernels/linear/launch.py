"""Linear layer on the GPU: C = A Bᵀ with sequential K, launched for the forward and both gradients."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels import chain
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.linear.pointer import matmul_pointer_kernel
from vexact.ops.kernels.linear.select import fit_float32_output, select_tile
from vexact.ops.kernels.linear.tiles import Layout, Tile
from vexact.ops.kernels.linear.tma import matmul_tma_kernel
from vexact.ops.kernels.sizes import cdiv

_launches = Launches()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x (M, K), weight (N, K) of any strides, bias (N,) or None -> (M, N): fp32 sums, rounded once to ``out_dtype``."""
    out = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    return matmul(x, weight, out, layout="forward", bias=bias)


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (M, N), weight (N, K) -> dy @ weight (M, K) in the dtype of ``dy``."""
    out = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device)
    return matmul(dy, weight.t(), out, layout="grad_input")


def grad_weight(dy: Tensor, x: Tensor) -> Tensor:
    """dy (M, N), x (M, K) -> dyᵀ @ x (N, K) in the dtype of ``x``; tokens are summed in order."""
    out = torch.empty(dy.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    return matmul(dy.t(), x.t(), out, layout="grad_weight")


def grad_bias(dy: Tensor) -> Tensor:
    """dy (M, N) -> its column sums (N,) in fp32, rounded once: a product with a row of ones, so tokens go in order."""
    out = torch.empty(1, dy.shape[1], dtype=dy.dtype, device=dy.device)
    return matmul(dy.new_ones(1, dy.shape[0]), dy.t(), out, layout="grad_weight")[0]


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    layout: Layout,
    bias: Tensor | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Write a (M, K) @ b (N, K)ᵀ (+ bias) into ``out`` (M, N), or with ``accumulate`` add it to an fp32 ``out``.

    ``tile`` overrides the table (for tuning and for tests); the bits do not depend on it.
    """
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0:
        return out
    strides, dtypes = (a.stride(), b.stride(), out.stride()), (a.dtype, b.dtype, out.dtype)
    _launches(
        (layout, m, n, k, strides, dtypes, None if bias is None else bias.dtype, accumulate, tile),
        (a, b, out) if bias is None else (a, b, out, bias),
        lambda: _call(a, b, out, bias, accumulate, layout, tile),
    )
    return out


def _call(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool, layout: Layout, tile: Tile | None
) -> Call:
    (m, k), n = a.shape, b.shape[0]
    if tile is None:
        descriptors = k > 0 and use_descriptors(a, b, out)
        tile = select_tile(layout, m, n, k, a.dtype, descriptors)
    if out.dtype == torch.float32 and capability(out.device)[0] >= 10:
        tile = fit_float32_output(tile)
    options = chain.options(m, layout == "forward" and overlaps(a.device)) | _options(tile)
    if tile.kernel == "tma":
        return _tma_call(a, b, out, bias, accumulate, tile, options)
    return _pointer_call(a, b, out, bias, accumulate, tile, options, tokens_are_depth=layout == "grad_weight")


def use_descriptors(*tensors: Tensor) -> bool:
    """Whether the device has the tensor memory accelerator and it can address every one of ``tensors``."""
    return capability(tensors[0].device)[0] >= 9 and all(_addressable(tensor) for tensor in tensors)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter, on CPU tensors, stands for sm_90."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends, as since sm_90. The interpreter runs one after the
    other, and AMD's devices, whose capability is another number, have nothing of the kind."""
    return device.type != "cpu" and torch.version.hip is None and capability(device)[0] >= 9


@cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; a small one for the interpreter, so that programs take several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _addressable(tensor: Tensor) -> bool:
    outer = tensor.stride(0) if tensor.stride(1) == 1 else tensor.stride(1)
    contiguous = 1 in tensor.stride()
    return contiguous and outer * tensor.element_size() % 16 == 0 and outer > 0 and tensor.data_ptr() % 16 == 0


def operand_descriptor(operand: Tensor, block: int, block_k: int) -> tuple[TensorDescriptor, bool]:
    """A descriptor of ``operand`` (rows, K) in the order it is stored, and whether that order is K-major."""
    if operand.stride(1) == 1:
        return TensorDescriptor(operand, list(operand.shape), list(operand.stride()), [block, block_k]), True
    stored = operand.t()
    return TensorDescriptor(stored, list(stored.shape), list(stored.stride()), [block_k, block]), False


def output_descriptor(out: Tensor, tile: Tile) -> tuple[TensorDescriptor, int]:
    """A descriptor of ``out`` and the number of strips: twice as many for fp32, so the staging buffer stays small."""
    splits = min(4, 2 * tile.splits) if out.element_size() == 4 else tile.splits
    return strip_descriptor(out, tile.block_m, tile.block_n // splits), splits


def strip_descriptor(out: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``out`` (M, N) that stores blocks of ``rows`` x ``columns``."""
    return TensorDescriptor(out, list(out.shape), list(out.stride()), [rows, columns])


def num_programs(m: int, n: int, tile: Tile, device: torch.device) -> int:
    tiles = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    return min(tiles, tile.waves * multiprocessors(device)) if tile.waves else tiles


def _tma_call(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, accumulate: bool, tile: Tile, options: dict[str, int | bool]
) -> Call:
    (m, k), n = a.shape, b.shape[0]
    a_desc, a_k_major = operand_descriptor(a, tile.block_m, tile.block_k)
    b_desc, b_k_major = operand_descriptor(b, tile.block_n, tile.block_k)
    c_desc, splits = output_descriptor(out, tile)
    constants = {
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m},
        **{"SPLITS": splits, "SWAP": tile.swap, "FLATTEN": tile.waves > 0},
        **{"A_K_MAJOR": a_k_major, "B_K_MAJOR": b_k_major, "HAS_BIAS": bias is not None, "ACCUMULATE": accumulate},
        **options,
    }
    args = a_desc, b_desc, c_desc, out if bias is None else bias, m, n, k
    return Call(matmul_tma_kernel, (num_programs(m, n, tile, out.device),), args, constants)


def _pointer_call(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None,
    accumulate: bool,
    tile: Tile,
    options: dict[str, int | bool],
    tokens_are_depth: bool,
) -> Call:
    (m, k), n = a.shape, b.shape[0]
    k_unit = 1 if tokens_are_depth or k % 16 else 16
    constants = {
        **{"K_UNIT": k_unit, "N_UNIT": 1 if n % 16 else 16},
        **{"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m},
        **{"SWAP": tile.swap, "EVEN_K": not tokens_are_depth and k % tile.block_k == 0},
        **{"HAS_BIAS": bias is not None, "ACCUMULATE": accumulate, "PRECISION": "ieee"},
        **options,
    }
    args = a, b, out, out if bias is None else bias, m, n, k // k_unit, *a.stride(), *b.stride(), *out.stride()
    return Call(matmul_pointer_kernel, (cdiv(m, tile.block_m) * cdiv(n, tile.block_n),), args, constants)


def _options(tile: Tile) -> dict[str, int]:
    # the default of contraction differs between releases
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
