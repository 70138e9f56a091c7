"""The trainer's forward and backward beside compiled stock operators: who is timed, and what a differing bit does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.trainer import forward_backward as benchmark
from benchmarks.trainer.forward_backward_sides import Ours, attention_forms, micro_batch, random_weights
from benchmarks.trainer.forward_backward_stock import Stock
from benchmarks.trainer.forward_backward_turns import TIMED
from benchmarks.trainer.grpo_run import TINY
from vexact.models import CausalLM
from vexact.ops.kernels.attention import launch


@pytest.fixture
def model() -> CausalLM:
    return random_weights(TINY, torch.device("cpu"), torch.float32)


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.setitem(benchmark.CASES, "tiny", (TINY, {"2 x 24": [24] * 2}))
    command = ["forward_backward", "--shape", "tiny", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    assert benchmark.main() == 0
    kept, again = json.loads(out.read_text())["cases"]
    printed = capsys.readouterr().out
    for case in (kept, again):
        assert set(case["sides"]) == {"specialised", "triton", "flash"}
        assert len(case["sides"]["flash"]["all_ms"]) == 2 * TIMED
        assert all(error < 1e-5 for error in case["sides"]["flash"]["errors"].values())
        assert case["sides"]["flash"]["attention"][0].startswith("_scaled_dot_product_flash_attention")
        assert case["ratios"]["triton"]["flash"] > 0
        assert case["bits"]["values"] > 100_000
        assert not benchmark.is_different(case)
        assert list(case["not_run"]) == ["cudnn"]
        assert f"2 x 24, {case['mode']}: cudnn NOT RUN: " in printed


def test_a_differing_bit_is_counted(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Ours.forward_backward

    def off_by_a_bit(self: Ours, *args: object) -> Tensor:
        logprobs = right(self, *args)
        if not launch.PROVEN:
            self.model.norm.weight.grad.view(torch.int32)[3] ^= 1
        return logprobs

    monkeypatch.setattr(Ours, "forward_backward", off_by_a_bit)
    monkeypatch.setattr(launch, "PROVEN", frozenset())
    record = benchmark.measure(Ours(model), "no peer today", micro_batch(model, [8, 8]), False, 1, lambda: False)
    assert (record["bits"]["logprobs_different"], record["bits"]["gradients_different"]) == (0, 1)
    assert benchmark.is_different(record)
    assert record["not_run"] == dict.fromkeys(("flash", "cudnn"), "no peer today")
    assert not launch.PROVEN


def test_a_peer_that_computes_something_else_is_not_timed(model: CausalLM) -> None:
    stock = Stock(model, "eager", head_rows=5)
    for layer in stock.model.model.layers:
        layer.self_attn.is_causal = False
    record = benchmark.measure(Ours(model), stock, micro_batch(model, [8, 8]), False, 1, lambda: False)
    assert record["not_run"]["flash"].startswith("NotThePeer: its logprobs are not ours: relative error ")
    assert set(record["sides"]) == {"specialised", "triton"}
    late = benchmark.measure(Ours(model), stock, micro_batch(model, [8, 8]), False, 3, lambda: True)
    assert late["not_run"]["flash"] == "TimeoutError: the time was up"
    assert len(late["sides"]["triton"]["all_ms"]) == TIMED


def test_what_is_chosen_unasked_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for passes, name in (((), "triton"), (("forward", "backward"), "specialised"), (("forward",), "as it is")):
        monkeypatch.setattr(launch, "PROVEN", frozenset(passes))
        forms, unasked = attention_forms()
        assert unasked == name
        assert set(forms) == {"specialised", "triton", name}


def test_ratios_and_utilisation_by_hand() -> None:
    ours = {"ms": 400.0, "specialised": ["forward"], "peak_gib": None, "first_s": 1.0}
    peer = {"ms": 450.0, "errors": {"logprobs": 0.01}, "peak_gib": 50.0, "first_s": 9.0}
    bits = {"values": 5, "logprobs_different": 0, "gradients_different": 0}
    record = {"case": "2 x 8k", "mode": "kept", "sides": {"triton": ours, "flash": peer}, "not_run": {}, "bits": bits}
    benchmark.add_ratios(record, flops=int(2e14), peak=1e15)
    assert record["ratios"] == {"triton": {"flash": 1.125}}
    assert (ours["mfu"], peer["mfu"]) == (0.5, 0.4444)
    first, second, _ = benchmark.table(record).splitlines()
    assert "400.00 ms  MFU  50.0%  flash / it  1.125  specialised: forward; first 1.0 s" in first
    assert " 50.0 GiB  differs by 0.01 (logprobs)" in second
