"""The serving benchmark: its workload and figures by hand, and a small run over HTTP."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from benchmarks.rollout import serving
from benchmarks.rollout.serving_load import MEAN_NEW, MOST_NEW, Load, Times, arrivals, draw, percentile, summary
from benchmarks.trainer.end_to_end import random_checkpoint
from benchmarks.trainer.grpo_run import SHAPES


def test_the_workload_is_what_it_says_and_always_the_same() -> None:
    loads = draw(4000, 1000, seed=3)
    assert loads == draw(4000, 1000, seed=3)
    assert loads != draw(4000, 1000, seed=4)
    assert {len(load.prompt) for load in loads} == set(range(64, 513))
    lengths = [load.max_tokens for load in loads]
    assert statistics.mean(lengths) == pytest.approx(MEAN_NEW, rel=0.05)
    assert (min(lengths) >= 2, max(lengths)) == (True, MOST_NEW)


def test_requests_come_at_their_rate_or_at_once() -> None:
    assert arrivals(3, math.inf, 0) == [0, 0, 0]
    times = arrivals(5000, 20.0, 0)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(250, rel=0.05)


def test_figures_by_hand() -> None:
    loads = [Load([1], 11), Load([1], 21)]
    figures = summary([Times(1.0, 1.5, 2.5, 11), Times(2.0, 2.1, 5.1, 21)], loads)
    assert (figures["seconds"], figures["out_tok_per_s"]) == (4.1, round(32 / 4.1, 1))
    assert figures["ttft_ms"] == {"p50": 300.0, "p95": 480.0}
    assert figures["tpot_ms"] == {"p50": 125.0, "p95": 147.5}
    assert percentile([3, 1, 2], 50) == 2
    with pytest.raises(RuntimeError, match="31 tokens came, 32 were asked for"):
        summary([Times(1.0, 1.5, 2.5, 10), Times(2.0, 2.1, 5.1, 21)], loads)


SIZES = ("--shape", "tiny", "--requests", "10", "--slots", "4", "--warmup", "2")


@pytest.mark.parametrize("mode", ["offline", "stock", "async"])
def test_a_mode_in_this_process(tmp_path: Path, mode: str) -> None:
    path = str(random_checkpoint(SHAPES["tiny"].raw | {"eos_token_id": 1, "rope_theta": 1e6}, tmp_path / "model"))
    arguments = serving.parse([*SIZES, "--model_path", path, "--rates", "inf"])
    figures = serving.run_mode(arguments, mode)["inf"]
    assert (figures["requests"], "ttft_ms" in figures) == (10, mode == "async")


def test_over_http_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "serving.json"
    serving.main([*SIZES, "--modes", "http", "--rates", "inf", "40", "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    for rate in ("inf", "40"):
        figures = runs["http"][rate]
        assert figures["requests"] == 10
        assert 0 < figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p95"]
