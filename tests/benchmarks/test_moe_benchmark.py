"""The mixture-of-experts benchmarks beside peers: who is timed, and what is said of those who are not."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.moe import few as few_benchmark
from benchmarks.moe import peers
from benchmarks.moe.cases import REHEARSAL, make_weights
from benchmarks.moe.layer import Layer
from benchmarks.moe.peers import Peer, Sizes, check, in_its_own_process, line, measure

SMALL = Sizes(7, (1, 5), (5,))
NAMES = ("tokens", "logits", "gate_up", "down")
EMPTY = {"training": {}, "not_run": {}}


@pytest.fixture
def without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run once; nothing is timed on a CPU."""
    monkeypatch.setattr(peers, "median_ms", lambda calls, **options: [call() for call in calls] and 2.0)
    monkeypatch.setattr(peers, "eager_ms", lambda calls, **options: [call() for call in calls] and 4.0)
    monkeypatch.setattr(Layer, "memory", lambda self, step: (0.0, 0.0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)


def stock(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
    return layer.stock_forward(x, logits)


def by_gate_and_up_exchanged(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
    weights, experts = layer.stock_routes(logits)
    gate_up = layer.weights.gate_up.unflatten(1, (2, -1)).flip(1).flatten(1, 2)[experts]
    gate, up = torch.einsum("th,tkih->tki", x, gate_up).chunk(2, dim=2)
    y = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, layer.weights.down[experts])
    return layer.add_shared((y * weights.unsqueeze(2)).sum(1), x)


@pytest.mark.usefixtures("without_a_clock")
def test_a_peer_that_computes_the_layer_is_timed(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "liger", lambda: Peer("stand-in 1.0", stock, captured=True))
    kept: list[str] = []
    record = measure("liger", REHEARSAL, SMALL, 60, lambda record: kept.append(json.dumps(record)))
    assert record["not_run"] == {}
    assert record["errors"]["output"] < 0.01
    assert record["forward"][5] == {"us": 2000.0, "tflops": REHEARSAL.flops(5) / 2000.0 / 1e6}
    assert list(record["forward"]) == [1, 5]
    assert record["training"] == {}  # it has no backward
    assert len(kept) == 4  # after the first calls and the check, too
    assert "stand-in 1.0; output differs by 0.0" in line(record)


@pytest.mark.usefixtures("without_a_clock")
def test_a_peer_that_tunes_does_so_for_many_tokens_and_before_its_time_runs(monkeypatch):
    """What tunes itself at a first call keeps that for all sizes."""
    now, seen = [0.0], []

    def tuning(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        now[0] += 1000.0 * (not seen)
        seen.append((x.shape[0], torch.is_grad_enabled()))
        return layer.forward(x, logits)

    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(peers.PEERS, "liger", lambda: Peer("2.0", tuning, trains=True))
    record = measure("liger", REHEARSAL, SMALL, 60, lambda record: None)
    assert record["not_run"] == {}
    assert seen[:2] == [(7, False), (7, True)]

    def out_of_memory(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(peers.PEERS, "liger", lambda: Peer("2.0", out_of_memory))
    record = measure("liger", REHEARSAL, SMALL, 60, lambda record: None)
    assert record["not_run"] == {"first calls": "RuntimeError: out of memory"}


def test_a_kernel_that_tunes_itself_is_given_less_time_for_it():
    @triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"])
    @triton.jit
    def kernel(x_ptr, n, BLOCK: tl.constexpr):
        pass

    peers.tune_briefly([kernel, len])
    assert kernel.do_bench.keywords == {"warmup": 5, "rep": 20}


@pytest.mark.usefixtures("without_a_clock")
def test_one_that_computes_something_else_is_not(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "liger", lambda: Peer("2.0", by_gate_and_up_exchanged))
    record = measure("liger", REHEARSAL, SMALL, 60, lambda record: None)
    assert record["forward"] == record["training"] == {}
    assert list(record["not_run"]) == ["check"]
    assert record["not_run"]["check"].startswith("ValueError: its output is not ours: relative error ")


@pytest.mark.usefixtures("without_a_clock")
def test_gradients_are_checked_of_one_that_trains():
    layer = Layer(REHEARSAL, make_weights(REHEARSAL))

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, dx):
            return dx / 2

    def right(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        return layer.forward(x, logits)

    assert set(check(layer, Peer("", right, trains=True))) == {"output", *(f"gradient of {n}" for n in NAMES)}
    with pytest.raises(ValueError, match=r"its gradient of tokens is not ours: relative error 0\.5"):
        check(layer, Peer("", lambda layer, x, logits: right(layer, Halved.apply(x), logits), trains=True))
    with pytest.raises(ValueError, match="its output is not ours: relative error inf"):
        check(layer, Peer("", lambda layer, x, logits: right(layer, x, logits) * float("nan")))


@pytest.mark.usefixtures("without_a_clock")
def test_what_fails_or_comes_too_late_does_not_stop_the_others(monkeypatch):
    def some(layer: Layer, x: Tensor, logits: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("no kernel for one row\nand a trace")
        return layer.forward(x, logits)

    monkeypatch.setitem(peers.PEERS, "vllm", lambda: Peer("3.0", some, trains=True))
    record = measure("vllm", REHEARSAL, SMALL, 60, lambda record: None)
    assert record["not_run"] == {"forward of 1 tokens": "RuntimeError: no kernel for one row"}
    assert list(record["forward"]) == list(record["training"]) == [5]
    late = measure("vllm", REHEARSAL, SMALL, -1, lambda record: None)
    assert late["not_run"] == {"check": "TimeoutError: -1 s are over"}


def test_one_that_cannot_be_imported_says_why():
    record = measure("sonic", REHEARSAL, SMALL, 60, lambda record: None)
    assert record["not_run"] == {"all of it": "ModuleNotFoundError: No module named 'sonicmoe'"}
    assert line(record) == "all of it NOT RUN: ModuleNotFoundError: No module named 'sonicmoe'"


def test_a_process_that_dies_leaves_what_it_had(monkeypatch, capsys):
    def run(command: list, **options: object) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "benchmarks.moe.peers"]
        command[-1].write_text(json.dumps({"version": "4", "forward": {"1": {"us": 1.0, "tflops": 2.0}}} | EMPTY))
        if options["timeout"] > 100:
            return SimpleNamespace(returncode=-11, stderr="")
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    for seconds, ending in ((60, "exit code -11: no word"), (10, "stopped after 55 s")):
        record = in_its_own_process("vllm", REHEARSAL, seconds)
        assert record["not_run"] == {"the rest": ending}
        assert record["forward"]["1"]["us"] == 1.0
        assert f"the rest NOT RUN: {ending}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_rehearsal_of_two_launches_finds_a_bit(tmp_path, monkeypatch):
    out = tmp_path / "few.json"

    def differing_rows(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["few", "--rehearse", "--out", str(out), *options])
        with pytest.raises(SystemExit) as ending:
            few_benchmark.main()
        found = json.loads(out.read_text())["rehearsal"]
        assert ending.value.code == bool(found["different"])
        assert found["rows"] == 2 * 3
        return found["different"]

    assert differing_rows("--routings", "2") == 0
    launch = few_benchmark.few.forward

    def off_by_a_bit(*args: object, **options: object) -> Tensor:
        out = launch(*args, **options)
        out.view(torch.int16)[0, 3] ^= 1
        return out

    monkeypatch.setattr(few_benchmark.few, "forward", off_by_a_bit)
    assert differing_rows("--routings", "2") == 2 * 2  # the first row of every call
