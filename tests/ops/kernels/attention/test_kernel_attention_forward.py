"""Attention forward kernels: against fp64, against their CPU twin, and bit for bit against each other."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import DEVICE, SMALL, Batch, cumulative, make_batch, make_pages, relative_error, same_bits

from vexact.ops.attention.reference import attention_reference
from vexact.ops.cpu import attention as twin
from vexact.ops.kernels.attention import packed_forward, paged_forward
from vexact.ops.kernels.attention.descriptors import row_descriptors
from vexact.ops.kernels.attention.launch import KeyBlocks, Tile
from vexact.ops.kernels.launches import forget

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 8e-4}
# More keys than queries, fewer, none, no queries, and a length on every side of a block and of a chunk.
Q_LENS, K_LENS = [35, 1, 0, 9, 4, 3], [35, 33, 3, 5, 0, 64]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "heads", "dims"),
    [
        (torch.float32, (2, 1), (40, 24)),
        (torch.bfloat16, (3, 1), (32, 32)),
        (torch.bfloat16, (2, 2), (192, 128)),
        (torch.float16, (2, 1), (80, 80)),
    ],
)
def test_packed_matches_fp64(dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], causal: bool) -> None:
    batch = make_batch(Q_LENS, K_LENS, heads=heads, dims=dims, dtype=dtype)
    out, lse = packed_forward(*batch.arguments, causal)
    expected, expected_lse = attention_reference(batch.q, batch.k, batch.v, batch.cu_q, batch.cu_k, batch.scale, causal)
    blind = expected_lse == float("-inf")
    assert blind.any()
    assert torch.equal(lse == float("-inf"), blind)
    assert not out[blind].any()
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert torch.allclose(lse[~blind].double(), expected_lse[~blind], atol=max(1e-5, TOLERANCE[dtype]), rtol=0)


def test_matches_the_cpu_twin() -> None:
    batch = make_batch([33, 7], [33, 7], dtype=torch.float32)
    out, lse = packed_forward(*batch.arguments, True)
    on_cpu = (argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in batch.arguments)
    expected, expected_lse = twin.packed_forward(*on_cpu, True)
    assert relative_error(out.cpu(), expected) < 1e-6
    assert relative_error(lse.cpu(), expected_lse) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_bits_do_not_depend_on_the_tile(causal: bool) -> None:
    batch = make_batch([70, 3, 17], [70, 40, 9], heads=(1, 1))
    expected = packed_forward(*batch.arguments, causal, tile=Tile(64, 4, 1), key_blocks=SMALL)
    for block_m in (16, 32):
        assert same_bits(expected, packed_forward(*batch.arguments, causal, tile=Tile(block_m, 4, 1), key_blocks=SMALL))


def test_bits_depend_on_the_key_blocks() -> None:
    """The comparison above can fail: the constants that do decide bits are seen to."""
    batch = make_batch([70], [70], heads=(1, 1))
    results = [packed_forward(*batch.arguments, True, key_blocks=KeyBlocks(16, chunk)) for chunk in (32, 48)]
    assert not same_bits(*results)
    assert relative_error(results[0][0], results[1][0]) < TOLERANCE[torch.bfloat16]


def test_bits_do_not_depend_on_batch_mates() -> None:
    batch = make_batch([40, 5, 1], [40, 33, 70])
    together = packed_forward(*batch.arguments, True, tile=Tile(32, 4, 1), key_blocks=SMALL)
    for index, (low, high) in enumerate(zip(*[cumulative(batch.q_lens).tolist()[i:] for i in (0, 1)], strict=False)):
        alone = packed_forward(*batch.sequence(index).arguments, True, tile=Tile(32, 4, 1), key_blocks=SMALL)
        assert same_bits(tuple(part[low:high] for part in together), alone)


@pytest.mark.parametrize(
    ("page_size", "dims", "causal"),
    [(5, (32, 32), True), (16, (40, 24), False), (8, (32, 32), True), (32, (32, 32), False), (96, (32, 32), True)],
)
def test_pages_give_the_bits_of_packed_rows(page_size: int, dims: tuple[int, int], causal: bool) -> None:
    batch = make_batch(Q_LENS, K_LENS, dims=dims)
    pages = make_pages(batch, page_size)
    expected = packed_forward(*batch.arguments, causal, tile=Tile(64, 4, 1), key_blocks=SMALL)
    for split_rows in (0, 1, 4):  # every sequence walked in order, single tokens in parallel chunks, short ones too
        assert same_bits(expected, pages.run(batch, causal, split_rows=split_rows, tile=Tile(32, 4, 1)))


def test_decode_of_every_position_gives_the_bits_of_prefill() -> None:
    length = 67 if DEVICE == "cuda" else 37
    batch = make_batch([length], [length], heads=(3, 1))
    pages = make_pages(batch, 16)
    expected = packed_forward(*batch.arguments, True, tile=Tile(64, 4, 1), key_blocks=SMALL)
    pages.table = pages.table.expand(length, -1).contiguous()
    steps = Batch(batch.q, batch.k, batch.v, [1] * length, list(range(1, length + 1)))
    assert same_bits(expected, pages.run(steps))
    late = slice(length - 6, length)
    few = Batch(batch.q[late], batch.k, batch.v, [1] * 6, steps.k_lens[late])
    pages.table = pages.table[late]
    assert same_bits(tuple(rows[late] for rows in expected), pages.run(few, decode_tile=Tile(32, 2, 1)))


def test_chunked_prefill_gives_the_bits_of_prefill() -> None:
    batch = make_batch([67], [67])
    pages = make_pages(batch, 7)
    expected = packed_forward(*batch.arguments, True, tile=Tile(64, 4, 1), key_blocks=SMALL)
    done = 0
    for new in (20, 1, 46):
        part = Batch(batch.q[done : done + new], batch.k, batch.v, [new], [done + new])
        got = pages.run(part, tile=Tile(16, 4, 1))
        assert same_bits(tuple(rows[done : done + new] for rows in expected), got)
        done += new


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31_elements() -> None:
    batch = make_batch([5, 1], [70, 300], heads=(16, 8), dims=(128, 128))
    pages = make_pages(batch, 16)
    expected = pages.run(batch)
    num_pages, first = 2**31 // (16 * 8 * 128) + 100, 2**31 // (16 * 8 * 128) + 50
    for name in ("k_cache", "v_cache"):
        small = getattr(pages, name)
        large = torch.empty(num_pages, *small.shape[1:], dtype=small.dtype, device=DEVICE)
        large[first : first + len(small)] = small
        setattr(pages, name, large)
    pages.table = torch.where(pages.table >= 0, pages.table + first, -1)
    for split_rows in (0, 5):
        assert same_bits(expected, pages.run(batch, split_rows=split_rows))


def test_rows_past_the_batch_are_left_alone() -> None:
    """A CUDA graph pads the batch: extra query rows, sequences without queries, and tables that point nowhere."""
    batch = make_batch([1, 1, 0], [33, 3, 0])
    pages = make_pages(batch, 16)
    expected = pages.run(batch)
    padded = Batch(torch.cat([batch.q, batch.q[:1] * float("nan")]), batch.k, batch.v, [1, 1, 0], [33, 3, 0])
    got = pages.run(padded)
    assert same_bits(expected, tuple(rows[:2] for rows in got))


def test_views_with_strides_are_read_in_place() -> None:
    batch = make_batch([20], [20], heads=(4, 2), dims=(32, 32))
    fused = torch.cat([batch.q, batch.k, batch.v], dim=1)
    views = (fused[:, :4], fused[:, 4:6], fused[:, 6:])
    expected = packed_forward(*batch.arguments, True, key_blocks=SMALL)
    assert same_bits(expected, packed_forward(*views, *batch.arguments[3:], True, key_blocks=SMALL))


def test_nothing_to_do() -> None:
    empty = make_batch([0, 0], [3, 0])
    out, lse = packed_forward(*empty.arguments, True)
    assert out.shape == (0, 2, 32)
    assert lse.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale is -1.0"),
        ({"q": torch.zeros(1, 3, 32)}, "3 query heads over 2"),
        ({"q": torch.zeros(1, 2, 48)}, "head dims q 48, k 32"),
        ({"v": torch.zeros(1, 2, 512)}, "v 512"),
        ({"v": torch.zeros(1, 2, 32, dtype=torch.float16)}, "must share"),
        ({"k": torch.zeros(1, 2, 64)[..., ::2]}, "k has last stride 2"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {name: torch.zeros(1, 2, 32) for name in "qkv"} | {"softmax_scale": 1.0} | change
    lengths = (cumulative([1]), cumulative([1]), 1, 1)
    with pytest.raises(ValueError, match=message):
        packed_forward(*(arguments[name] for name in "qkv"), *lengths, arguments["softmax_scale"], True)


def test_paged_checks_its_heads() -> None:
    cache = torch.zeros(1, 16, 2, 32, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    used = torch.ones(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        paged_forward(torch.zeros(1, 3, 32), cache, cache, cumulative([1]), used, table, 1, 1, 1.0, True)


@pytest.mark.parametrize("page_size", [16, 32])
def test_descriptors_load_what_pointers_load(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the slots and rows after a sequence are NaN, and where heads are a slice of wider rows."""
    batch = make_batch([5, 40], [70, 90], heads=(4, 2), dims=(32, 16))  # several whole blocks that every row sees
    wide = [torch.cat([rows, rows * float("nan")], dim=1)[:, :2] for rows in (batch.k, batch.v)]
    sliced = Batch(batch.q, *wide, batch.q_lens, batch.k_lens)
    pages = make_pages(batch, page_size)

    def results() -> list[tuple[torch.Tensor, torch.Tensor]]:
        whole = packed_forward(*sliced.arguments, True, key_blocks=SMALL)
        return [whole, *(pages.run(batch, split_rows=split_rows) for split_rows in (0, 64))]

    assert row_descriptors(*wide, SMALL.block_n) is not None
    assert row_descriptors(pages.k_cache, pages.v_cache, SMALL.block_n) is not None
    described = results()
    for module in ("packed", "paged"):
        monkeypatch.setattr(f"vexact.ops.kernels.attention.{module}.row_descriptors", lambda *_: None)
    forget()
    for one, other in zip(described, results(), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize(
    "k",
    [
        torch.zeros(40, 2, 40),  # a wider box would read the next head
        torch.zeros(40, 1, 32).expand(-1, 2, -1),  # heads that overlap
        torch.zeros(3, 8, 2, 32),  # a block of 16 keys is not in one page
        torch.zeros(0, 2, 32),
        torch.zeros(40, 66)[:, 1:65].unflatten(1, (2, 32)),  # rows that start off a 16-byte boundary
    ],
)
def test_rows_that_descriptors_cannot_load_go_by_pointers(k: torch.Tensor) -> None:
    assert row_descriptors(k, k, 16) is None
