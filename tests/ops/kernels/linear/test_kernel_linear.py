"""The linear kernels: right values at every edge, and one set of bits whatever the tile and the batch."""

from __future__ import annotations

import pytest
import torch
from linear_support import DEVICE, at_once, integers, randn, tensor_core  # noqa: F401

from vexact.ops.kernels import linear
from vexact.ops.kernels.linear.launch import use_descriptors
from vexact.ops.kernels.linear.select import fit_float32_output, select_tile
from vexact.ops.kernels.linear.tile_table import TUNED
from vexact.ops.kernels.linear.tiles import FLOAT32_TILES, POINTER_TILES, Tile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def table_tiles(layout: str) -> list[Tile]:
    """The tiles of a layout that differ in something the interpreter can see."""
    tuned = [tile for key, entries in TUNED.items() if key[0] == layout for _, tile in entries]
    seen: dict[tuple, Tile] = {}
    for tile in (*tuned, *(tile for _, tile in (*POINTER_TILES, *FLOAT32_TILES))):
        seen.setdefault((tile.kernel, tile.block_m, tile.block_n, tile.block_k, tile.splits, tile.swap), tile)
    return list(seen.values())


def operands(layout: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """(m, k) and (n, k) stored the way ``layout`` stores them."""
    a = randn(m, k, seed=1, dtype=dtype) if layout != "grad_weight" else randn(k, m, seed=1, dtype=dtype).t()
    b = randn(n, k, seed=2, dtype=dtype) if layout == "forward" else randn(k, n, seed=2, dtype=dtype).t()
    return a, b


@pytest.mark.parametrize("layout", ["forward", "grad_input", "grad_weight"])
def test_every_tile_of_the_table_gives_the_same_bits(layout):
    a, b = operands(layout, 72, 152, 328)
    tiles, expected = table_tiles(layout), at_once(a, b)
    if DEVICE != "cpu":  # the order inside one instruction is the hardware's, so there a tile is the reference
        modelled, expected = expected, linear.matmul(a, b, expected.clone(), layout=layout, tile=tiles[0])
        assert (expected - modelled).norm() <= 1e-6 * modelled.norm()
    for tile in tiles:
        out = torch.full((72, 152), float("nan"), device=DEVICE)
        assert torch.equal(linear.matmul(a, b, out, layout=layout, tile=tile), expected), tile


def test_a_product_cut_along_k_would_be_noticed():
    a, b = operands("forward", 72, 152, 328)
    first, second = at_once(a[:, :160], b[:, :160]), at_once(a[:, 160:], b[:, 160:])
    assert not torch.equal(first + second, at_once(a, b))


def test_a_row_has_the_same_bits_in_every_batch():
    weight, bias, x = randn(80, 96, seed=1), randn(80, seed=2), randn(300, 96, seed=3)
    for dtype in (torch.bfloat16, torch.float32):
        full = linear.forward(x.to(dtype), weight.to(dtype), bias.to(dtype), dtype)
        for start, rows in ((0, 1), (40, 17), (3, 33), (100, 130)):
            part = x[start : start + rows].to(dtype)
            alone = linear.forward(part, weight.to(dtype), bias.to(dtype), dtype)
            assert torch.equal(alone, full[start : start + rows])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 73, 50), (37, 96, 72), (130, 64, 40)])
def test_forward_and_gradients_at_ragged_sizes(dtype, m, n, k):
    x, weight = integers(m, k, seed=1, dtype=dtype), integers(n, k, seed=2, dtype=dtype)
    bias, dy = integers(n, seed=3, dtype=dtype), integers(m, n, seed=4, dtype=dtype)
    wide = [t.float() for t in (x, weight, bias, dy)]
    assert torch.equal(linear.forward(x, weight, bias, torch.float32), wide[0] @ wide[1].T + wide[2])
    assert torch.equal(linear.grad_input(dy, weight), (wide[3] @ wide[1]).to(dtype))
    assert torch.equal(linear.grad_weight(dy, x), (wide[3].T @ wide[0]).to(dtype))
    assert torch.equal(linear.grad_bias(dy), wide[3].sum(0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_from_the_fp32_sum(dtype):
    x, weight, bias = (randn(*shape, seed=5, dtype=dtype) for shape in ((20, 64), (48, 64), (48,)))
    assert torch.equal(linear.forward(x, weight, bias, dtype), linear.forward(x, weight, bias, torch.float32).to(dtype))


def test_weights_of_any_stride():
    x, weight = integers(20, 48, seed=1, dtype=torch.bfloat16), integers(40, 48, seed=2, dtype=torch.bfloat16)
    expected = x.float() @ weight.float().T
    wider = torch.full((40, 101), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wider[:, 3:51] = weight
    every_other = torch.full((80, 96), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    every_other[::2, ::2] = weight
    for view in (weight.t().contiguous().t(), wider[:, 3:51], every_other[::2, ::2]):
        assert torch.equal(linear.forward(x, view, None, torch.float32), expected)
        dy = integers(20, 40, seed=3, dtype=torch.bfloat16)
        assert torch.equal(linear.grad_input(dy, view), (dy.float() @ weight.float()).bfloat16())


@pytest.mark.parametrize("columns", [64, 61])
def test_accumulation_adds_to_what_is_there(columns):
    a, b = integers(40, 32, seed=1, dtype=torch.bfloat16), integers(columns, 32, seed=2, dtype=torch.bfloat16)
    out = integers(40, columns, seed=3, dtype=torch.float32)
    expected = out + a.float() @ b.float().T
    assert torch.equal(linear.matmul(a, b, out, layout="forward", accumulate=True), expected)


def test_batches_without_rows():
    x, weight = torch.empty(0, 32, device=DEVICE), randn(16, 32, seed=1)
    assert linear.forward(x, weight, None, torch.float32).shape == (0, 16)
    assert torch.equal(linear.grad_weight(torch.empty(0, 16, device=DEVICE), x), torch.zeros(16, 32, device=DEVICE))


def test_tile_choice():
    known = select_tile("forward", 16, 4096, 2048, torch.bfloat16, descriptors=True)
    assert known.block_m == 16
    assert select_tile("forward", 8192, 4096, 2048, torch.bfloat16, descriptors=True).block_m == 128
    assert select_tile("forward", 16, 3900, 2100, torch.bfloat16, descriptors=True) == known
    assert select_tile("forward", 16, 4096, 2048, torch.bfloat16, descriptors=False).kernel == "pointer"
    assert select_tile("grad_weight", 64, 64, 10**6, torch.float32, descriptors=True) == FLOAT32_TILES[1][1]


def test_fp32_results_that_do_not_fit_beside_tensor_memory_take_another_tile():
    large, small = Tile("tma", 128, 256, 64, 8, 4, 8, 4, 1), Tile("tma", 64, 64, 128, 4, 6)
    assert fit_float32_output(large).block_n == 128
    assert fit_float32_output(small) == small


def test_descriptors_need_sixteen_byte_strides():
    even, odd = randn(8, 64, seed=1, dtype=torch.bfloat16), randn(8, 61, seed=1, dtype=torch.bfloat16)
    has_descriptors = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    assert use_descriptors(even, even.t()) == has_descriptors
    assert not use_descriptors(even, odd)
    assert not use_descriptors(even[:, 1:57])


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(2048, 6144), (12288, 2048)])
def test_every_tile_and_batch_gives_the_same_bits_on_the_gpu(n, k):
    x, weight = randn(8192, k, seed=1, dtype=torch.bfloat16), randn(n, k, seed=2, dtype=torch.bfloat16)
    full = linear.forward(x, weight, None, torch.float32)
    reference = x[:256].double() @ weight.double().T
    assert (full[:256] - reference).norm() <= 1e-5 * reference.norm()
    tiles = {tile for key, entries in TUNED.items() for _, tile in entries} | {tile for _, tile in POINTER_TILES}
    for tile in sorted(tiles, key=repr):
        for rows in (1, 100, 600, 8192):
            out = torch.full((rows, n), float("nan"), device=DEVICE)
            assert torch.equal(linear.matmul(x[:rows], weight, out, layout="forward", tile=tile), full[:rows]), tile


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [151936, 151931])
def test_offsets_beyond_32_bits(columns):
    rows = 2**31 // columns + 300
    x, weight = randn(rows, 64, seed=1, dtype=torch.bfloat16), randn(columns, 64, seed=2, dtype=torch.bfloat16)
    out = linear.forward(x, weight, None, torch.bfloat16)
    assert torch.equal(out[-200:], linear.forward(x[-200:], weight, None, torch.bfloat16))
    assert torch.equal(linear.grad_input(out, weight)[-200:], linear.grad_input(out[-200:], weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_close_to_fp64_on_the_gpu(dtype):
    x, weight = randn(1000, 512, seed=1, dtype=dtype), randn(768, 512, seed=2, dtype=dtype)
    dy = randn(1000, 768, seed=3, dtype=dtype)
    wide = [t.double() for t in (x, weight, dy)]
    pairs = (
        (linear.grad_input(dy, weight), wide[2] @ wide[1]),
        (linear.grad_weight(dy, x), wide[2].T @ wide[0]),
        (linear.grad_bias(dy), wide[2].sum(0)),
    )
    for ours, reference in pairs:
        stock = reference.to(dtype).double()  # the best any implementation with this output dtype can do
        limit = 2 * (stock - reference).norm() + 1e-6 * reference.norm()
        assert (ours.double() - reference).norm() <= limit
