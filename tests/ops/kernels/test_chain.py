"""Kernels that start while the one before them ends: they wait first and compute the same. What their machine code does
is looked at in ``chain_compile``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_support import DEVICE, randn, tensor_core  # noqa: F401
from processes import PATIENCE_S
from rowwise import same_bits
from triton.runtime.interpreter import GridExecutor

from vexact.ops.kernels import chain, linear, linear_swiglu, rms_norm, swiglu
from vexact.ops.kernels.attention import paged
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.launches import forget
from vexact.ops.kernels.linear import launch as linear_launch
from vexact.ops.kernels.linear.tiles import Tile
from vexact.ops.kernels.moe import combine, few, grouped_linear, router
from vexact.ops.kernels.moe import tma as moe_tma
from vexact.ops.kernels.rotary import rope_to_cache

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
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What programs do about other kernels, in order: "wait" and "start next"."""
    events: list[str] = []

    monkeypatch.setattr(chain, "gdc_wait", lambda: events.append("wait"))
    monkeypatch.setattr(chain, "gdc_launch_dependents", lambda: events.append("start next"))
    for module in (linear_launch, linear_swiglu, rms_norm, swiglu, rope_to_cache):
        monkeypatch.setattr(module, "overlaps", lambda device: True)
    return events


def turn_on(monkeypatch: pytest.MonkeyPatch, **what: Any) -> None:
    monkeypatch.setattr(chain, "STEPS", ((chain.LARGE, Chain(**what)),))
    forget()


def test_small_steps_are_chained_on_devices_that_can_overlap() -> None:
    chained = {"CHAINED": 1, "launch_pdl": True}
    for rows, product, norm in ((1, 1, 2), (2, 1, 1), (64, 1, 1), (128, 1, 1), (129, 0, 0), (8192, 0, 0)):
        assert chain.options(rows, True) == (chained if product else {"CHAINED": 0})
        assert chain.options(rows, True, may_be_early=True)["CHAINED"] == norm
        assert chain.options(rows, False, may_be_early=True) == {"CHAINED": 0}
        assert not chain.of(rows).fuse
    assert chain.overlapping(True) == {"launch_pdl": True}
    assert chain.overlapping(False) == {}


@pytest.mark.parametrize(
    ("device", "capability", "hip", "expected"),
    [
        ("cpu", (9, 0), None, False),
        ("cuda", (8, 0), None, False),
        ("cuda", (9, 0), None, True),
        ("cuda", (12, 0), None, True),
        ("cuda", (9, 4), "7.0", False),
    ],
)
def test_which_devices_can_overlap(
    device: str, capability: tuple[int, int], hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_launch, "capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert linear_launch.overlaps(torch.device(device)) is expected


def test_the_first_bound_that_holds_the_rows_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (16, Chain()), (64, Chain(overlap=True, early=True)), (chain.LARGE, Chain(overlap=True))
    monkeypatch.setattr(chain, "STEPS", steps)
    assert [chain.options(rows, True, may_be_early=True)["CHAINED"] for rows in (1, 16, 17, 64, 65)] == [0, 0, 2, 2, 1]
    assert chain.options(64, True) == {"CHAINED": 1, "launch_pdl": True}  # products wait first
    assert chain.options(64, False, may_be_early=True) == {"CHAINED": 0}


@interpreted
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", [3, 40])
def test_every_program_of_a_product_waits(
    tile: Tile, rows: int, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = randn(rows, 192, seed=1, dtype=torch.bfloat16), randn(152, 192, seed=2, dtype=torch.bfloat16)
    out = x.new_empty(rows, 152)
    turn_on(monkeypatch)
    plain = linear.matmul(x, weight, out, layout="forward", tile=tile).clone()
    assert not log
    turn_on(monkeypatch, overlap=True)
    assert same_bits(linear.matmul(x, weight, out, layout="forward", tile=tile), plain)
    programs = linear_launch.num_programs(rows, 152, tile, x.device)
    assert log == ["wait", "start next"] * programs


@interpreted
def test_gradients_are_not_chained(log: list[str]) -> None:
    assert chain.of(4).overlap
    x, weight = randn(4, 64, seed=1, dtype=torch.bfloat16), randn(64, 48, seed=2, dtype=torch.bfloat16)
    linear.grad_input(x, weight)
    linear.grad_weight(x, x)
    linear.grad_bias(x)
    swiglu.backward(x[:, :32].contiguous(), x)
    assert not log


@interpreted
@pytest.mark.parametrize("early", [False, True])
def test_every_program_of_a_row_kernel_waits(early: bool, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(5, 2048, seed=1, dtype=torch.bfloat16), randn(2048, seed=2, dtype=torch.bfloat16)
    calls: list[Callable[[], Any]] = [
        lambda: rms_norm.forward(x, weight, 1e-6)[0],
        lambda: rms_norm.add_forward(x, x, weight, 1e-6)[0],
        lambda: swiglu.forward(x),
    ]
    turn_on(monkeypatch)
    plain = [call() for call in calls]
    assert not log
    turn_on(monkeypatch, overlap=True, early=early)
    for call, expected in zip(calls, plain, strict=True):
        log.clear()
        assert same_bits(call(), expected)
        assert log == (["start next", "wait"] if early else ["wait", "start next"]) * 5


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_experts_wait_among_kernels_that_are_chained(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of experts overlap on their own: each that is launched while the one before it ends waits in every
    program, so that a chained norm or product that comes next may start on its word."""
    events, grids = [], []
    run = GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        events.append([])
        grids.append((self.fn.__name__, math.prod(self.grid), kwargs.get("launch_pdl", False)))
        run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    for module in (chain, few, moe_tma, combine, router):
        for name, event in (("gdc_wait", "wait"), ("gdc_launch_dependents", "start next")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda event=event: events[-1].append(event))
    for module in (linear_launch, rms_norm, few, grouped_linear, combine, router):
        monkeypatch.setattr(module, "overlaps", lambda device: True)
    tokens, num_experts, hidden, width, top_k = 3, 5, 48, 24, 2
    settings = top_k, "softmax", 1, 1, True, 1.0, torch.float32, 0
    x, gate = (randn(rows, hidden, seed=1, dtype=torch.bfloat16) for rows in (tokens, num_experts))
    gate_up = randn(num_experts, 2 * width, hidden, seed=2, dtype=torch.bfloat16)
    down = randn(num_experts, hidden, width, seed=3, dtype=torch.bfloat16)
    padding = torch.ones(tokens, dtype=torch.bool) if padded else None  # no program has work then

    def layer(in_two: bool) -> None:
        normed = rms_norm.forward(x, gate[0], 1e-6)[0]
        logits = linear.forward(normed, gate, None, torch.float32)
        if in_two:
            out = few.forward(normed, logits, None, None, padding, gate_up, down, None, *settings)
        else:
            _, weights, rows, slots, offsets = router.grouped_forward(logits, None, None, padding, *settings)
            act = grouped_linear.swiglu_forward(normed, gate_up, rows, offsets, top_k)
            y = grouped_linear.forward(act, down, None, offsets, top_k)
            out = combine.forward(y, weights, slots, None)
        rms_norm.add_forward(out, x, gate[0], 1e-6)

    layer(in_two=True)
    layer(in_two=False)
    names = [name for name, _, _ in grids]
    experts = ["few_gated_kernel", "few_down_kernel", "route_kernel", *["grouped_tma_kernel"] * 2, "combine_kernel"]
    assert [name for name in names if name in experts] == experts
    assert sum(overlapped for _, _, overlapped in grids) == len(grids) - 1
    for (name, programs, overlapped), seen in zip(grids, events, strict=True):
        assert seen.count("wait") == programs * overlapped, name
        assert overlapped or name == "route_kernel", name
        if overlapped and "start next" in seen:
            assert seen == ["wait", "start next"] * programs, name


def test_code_waits_before_it_touches_memory_and_computes_the_same(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = _SCRIPT.parents[3], _SCRIPT.parent / "linear"
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run(
        [sys.executable, str(_SCRIPT)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
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
