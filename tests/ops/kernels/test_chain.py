"""Kernels that start while the one before them ends: they wait first, ask for their own weights only, and compute the
same. What their machine code does is looked at in ``chain_compile``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_support import DEVICE, randn, tensor_core  # noqa: F401
from rowwise import misaligned, same_bits

from vexact.ops.kernels import chain, linear, linear_swiglu, rms_norm, rope_to_cache, swiglu
from vexact.ops.kernels.attention import paged
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.linear import launch as linear_launch
from vexact.ops.kernels.linear.tiles import Tile

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
_SCRIPT = Path(__file__).with_name("chain_compile.py")
ROW_KERNELS = {"_forward_kernel", "_rope_to_cache_kernel"}
TILES = [
    Tile("tma", 16, 64, 64, 4, 3, swap=True),
    Tile("tma", 16, 32, 64, 2, 3),
    Tile("tma", 32, 128, 64, 4, 3, waves=1),
    Tile("pointer", 16, 64, 64, 4, 3),
]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What programs do about other kernels, in order: (address, size) arrays, "wait", "start next"."""
    events: list[Any] = []

    def request(address: Any, size: Any) -> None:
        sizes = np.broadcast_to(size.handle.data, address.handle.data.shape)
        events.append(np.stack([address.handle.data.ravel(), sizes.ravel().astype(np.int64)], 1))

    monkeypatch.setattr(chain, "request", request)
    monkeypatch.setattr(chain, "gdc_wait", lambda: events.append("wait"))
    monkeypatch.setattr(chain, "gdc_launch_dependents", lambda: events.append("start next"))
    for module in (linear_launch, linear_swiglu, rms_norm, swiglu, rope_to_cache):
        monkeypatch.setattr(module, "overlaps", lambda device: True)
    return events


def turn_on(monkeypatch: pytest.MonkeyPatch, **what: Any) -> None:
    monkeypatch.setattr(chain, "STEPS", ((chain.LARGE, Chain(**what)),))


def requested(events: list[Any]) -> tuple[list[tuple[int, int]], int]:
    """Every (address, size) that was asked for, and the number of programs. Each has to ask, wait, start the next."""
    spans, programs, asked = [], 0, True
    for event in events:
        if isinstance(event, np.ndarray):
            assert asked, "a program asked for something after its wait"
            spans += [(int(address), int(size)) for address, size in event if size]
        elif event == "wait":
            asked, programs = False, programs + 1
        else:
            asked = True
    return spans, programs


def test_nothing_is_on_that_was_not_measured() -> None:
    assert ((chain.LARGE, Chain()),) == chain.STEPS
    assert chain.options(1, possible=True) == {"CHAINED": 0}


def test_the_first_bound_that_holds_the_rows_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (16, Chain()), (64, Chain(overlap=True, early=True)), (chain.LARGE, Chain(overlap=True))
    monkeypatch.setattr(chain, "STEPS", steps)
    assert [chain.options(rows, True, may_be_early=True)["CHAINED"] for rows in (1, 16, 17, 64, 65)] == [0, 0, 2, 2, 1]
    assert chain.options(64, True) == {"CHAINED": 1, "launch_pdl": True}  # products wait first
    assert chain.options(64, False, may_be_early=True) == {"CHAINED": 0}


@pytest.mark.parametrize(
    ("asked", "rows", "row_bytes", "warps"), [(65536, 32, 4096, 4), (999, 16, 80, 8), (0, 8, 64, 1)]
)
def test_pieces_are_whole_units_of_what_there_is(asked: int, rows: int, row_bytes: int, warps: int) -> None:
    count, size = chain.pieces(asked, rows, row_bytes, warps)
    assert size % 16 == 0
    assert count * size <= min(row_bytes, asked // rows)
    assert count * rows >= 32 * warps
    assert count & (count - 1) == 0


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", [3, 40])
def test_products_ask_for_each_row_of_their_weight_once(
    tile: Tile, rows: int, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = randn(rows, 192, seed=1, dtype=torch.bfloat16), randn(152, 192, seed=2, dtype=torch.bfloat16)
    out = x.new_empty(rows, 152)
    plain = linear.matmul(x, weight, out, layout="forward", tile=tile).clone()
    assert not log
    turn_on(monkeypatch, overlap=True, ask=8)
    linear_launch._launches.forget()
    assert same_bits(linear.matmul(x, weight, out, layout="forward", tile=tile), plain)
    spans, programs = requested(log)
    assert [event for event in log if isinstance(event, str)] == ["wait", "start next"] * programs
    covered = np.zeros(weight.numel() * 2, int)
    for address, size in spans:
        first = address - weight.data_ptr()
        assert 0 <= first <= covered.size - size
        assert address % 16 == size % 16 == 0
        covered[first : first + size] += 1
    covered = covered.reshape(152, -1)
    persistent = tile.waves * linear_launch.multiprocessors(x.device) * tile.block_n if tile.waves else 152
    depth = covered[0].sum()
    assert 0 < depth <= 8192 // tile.block_n
    assert (covered[:persistent, :depth] == 1).all()
    assert covered.sum() == depth * min(persistent, 152)


@interpreted
@pytest.mark.parametrize("tile", TILES)
def test_what_is_read_next_is_asked_for_once(tile: Tile, log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(3, 64, seed=1, dtype=torch.bfloat16), randn(152, 64, seed=2, dtype=torch.bfloat16)
    ahead, out = randn(400, 640, seed=3, dtype=torch.bfloat16), x.new_empty(3, 152)
    plain = linear.matmul(x, weight, out, layout="forward", tile=tile, ahead=ahead).clone()
    turn_on(monkeypatch, overlap=True, ahead=1)  # more than there is
    linear_launch._launches.forget()
    assert same_bits(linear.matmul(x, weight, out, layout="forward", tile=tile, ahead=ahead), plain)
    spans, programs = requested(log)
    size = spans[0][1]
    assert size == chain.shares(1 << 20, ahead.nbytes, programs, 32 * tile.warps) > 0
    assert spans == [(ahead.data_ptr() + size * index, size) for index in range(programs * 32 * tile.warps)]
    assert size * len(spans) <= ahead.nbytes
    log.clear()
    for unaligned in (misaligned(ahead), ahead.t()):  # an unaligned request is an error of the GPU
        assert same_bits(linear.matmul(x, weight, out, layout="forward", tile=tile, ahead=unaligned), plain)
    linear.matmul(x, weight, out, layout="forward", tile=tile)
    assert not requested(log)[0]
    log.clear()
    wide = ahead.float()  # as many numbers, twice the bytes
    assert same_bits(linear.matmul(x, weight, out, layout="forward", tile=tile, ahead=wide), plain)
    assert 0 < sum(size for _, size in requested(log)[0]) <= wide.nbytes


@interpreted
def test_gradients_and_weights_of_other_strides_ask_for_nothing(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_on(monkeypatch, overlap=True, ask=64)
    x, weight = randn(4, 64, seed=1, dtype=torch.bfloat16), randn(64, 48, seed=2, dtype=torch.bfloat16)
    linear.grad_input(x, weight)
    linear.grad_weight(x, x)
    assert not log
    linear.forward(x, weight.t(), None, x.dtype)
    spans, programs = requested(log)
    assert not spans
    assert programs > 0


@interpreted
@pytest.mark.parametrize("early", [False, True])
def test_every_program_of_a_row_kernel_waits(early: bool, log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(5, 2048, seed=1, dtype=torch.bfloat16), randn(2048, seed=2, dtype=torch.bfloat16)
    calls: list[Callable[[], Any]] = [
        lambda: rms_norm.forward(x, weight, 1e-6)[0],
        lambda: rms_norm.add_forward(x, x, weight, 1e-6)[0],
        lambda: swiglu.forward(x),
    ]
    plain = [call() for call in calls]
    assert not log
    turn_on(monkeypatch, overlap=True, early=early)
    for module in (rms_norm, swiglu):
        module._forward.forget()
    for call, expected in zip(calls, plain, strict=True):
        log.clear()
        assert same_bits(call(), expected)
        assert log == (["start next", "wait"] if early else ["wait", "start next"]) * 5


def test_code_waits_before_it_touches_memory_and_computes_the_same(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = _SCRIPT.parents[3], _SCRIPT.parent / "linear"
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run([sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    kernels = {record["kernel"] for record in records}
    products = {"matmul_tma_kernel", "matmul_pointer_kernel", "linear_swiglu_kernel"}
    assert kernels == {*products, *ROW_KERNELS, "chunk_kernel", "merge_kernel"}
    assert {record["early"] for record in records if record["kernel"] in ROW_KERNELS} == {False, True}
    for record in records:
        name, kernel = record["name"], record["kernel"]
        assert record["waits"] == 1, name
        # the merge looks up lengths, which the chunks, who wait, do not write
        allowed = "ld.global.b32" if kernel == "merge_kernel" else ()
        assert all(allowed and allowed in line for line in record["touches_before_wait"]), record
        assert record["starts_next_after_wait"] != record["early"], name
        assert record["requests"] == 2 * (kernel in products), name
        assert record["requests_before_wait"], name
        assert record["waits_when_plain"] == int(kernel == "merge_kernel"), name  # it overlaps the chunks anyway
        assert record["same_arithmetic"], name
        assert record["arithmetic"] > 5, name
        assert max(record["shared"]) <= 227 * 1024, name


def test_attention_is_chained_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    turn_on(monkeypatch, overlap=True, early=True)
    monkeypatch.setattr(paged, "overlaps", lambda device: True)
    seen: list[dict[str, Any]] = []
    for launches in ("_chunks", "_merge"):
        monkeypatch.setattr(paged, launches, lambda key, tensors, call: seen.append(call().constants))
    caches = [torch.zeros(80, 64, 2, 64, device=DEVICE) for _ in range(2)]
    lengths = (
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE) for numbers in ([0, 1], [2500], [list(range(40))])
    )
    paged.paged_forward(torch.zeros(1, 4, 64, device=DEVICE), *caches, *lengths, 1, 2500, 0.1, True)
    assert [constants["CHAINED"] for constants in seen] == [1, 1]
    assert all(constants["launch_pdl"] for constants in seen)
