"""The scale model, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.multi_gpu import scale_model
from benchmarks.multi_gpu.scale_model import (
    COLLECTIVE_S,
    NIC,
    NVLINK,
    SUM,
    Measured,
    all_to_all,
    at,
    check,
    check_file,
    predict,
    ring,
    sent_to_one_node,
)
from benchmarks.multi_gpu.scale_shapes import MODELS

ONE = Measured(
    model=MODELS["qwen3-1.7b"],
    sequences=512,
    prompt_tokens=512,
    new_tokens=1024,
    token_budget=16384,
    concurrent=256,
    generation=26.0,
    update=24.0,
    sync=0.1,
    rest=0.5,
)


def test_what_leaves_a_node() -> None:
    assert sent_to_one_node(2, 100) == (50, 0)
    assert sent_to_one_node(8, 80) == (70, 0)
    assert sent_to_one_node(16, 160) == (70, 80)


def test_an_all_to_all_sends_eight_times_as_much_out_of_a_node_as_a_ring() -> None:
    size = 16e9
    assert all_to_all(1, size) == ring(1, size) == 0
    assert all_to_all(2, size) == pytest.approx(8e9 / NVLINK + size / SUM + COLLECTIVE_S)
    assert ring(2, size) == pytest.approx(8e9 / NVLINK + COLLECTIVE_S)
    assert all_to_all(16, size) == pytest.approx(8e9 / NIC + size / SUM + COLLECTIVE_S)
    assert ring(16, size) == pytest.approx(max(15e9 / NVLINK, 15e9 / 8 / NIC) + COLLECTIVE_S)


def test_the_measured_bucket_is_reproduced() -> None:
    assert all_to_all(2, 201e6) == pytest.approx(0.54e-3, rel=0.05)
    assert ring(2, 201e6) == pytest.approx(0.495e-3, rel=0.05)


def test_one_gpu_is_what_was_measured() -> None:
    predicted = predict(ONE, ONE.model, 1)
    assert (predicted.step, predicted.gradients, predicted.gathers) == (pytest.approx(50.6), 0, 0)
    inexact = predict(ONE, ONE.model, 1, exact=False)
    assert inexact.step - predicted.step == pytest.approx(24.0 / 4), "the pass that an exact run does not need"


def test_compute_hides_collectives_and_what_is_left_shows() -> None:
    rounds = 52  # 1024 x 1536 tokens in micro-batches of 16384: 103 with ten sequences each, 104 by eights
    assert ONE.rounds(2) == (rounds, 0)
    assert ONE.rounds(3)[1] > 0, "160 micro-batches leave ranks of the last round without one"
    weights = MODELS["qwen3-1.7b"].shape.num_parameters
    two = predict(ONE, ONE.model, 2)
    assert two.gradients == pytest.approx(rounds * all_to_all(2, 4 * weights))
    assert two.gathers == pytest.approx(rounds * 2 * ring(2, 2 * weights))
    assert two.update == pytest.approx(24.0), "hidden"
    short = replace(ONE, update=1.0)
    assert predict(short, ONE.model, 2).update == pytest.approx(0.3 + two.gradients + two.gathers)
    far = predict(short, ONE.model, 64)
    near = predict(short, ONE.model, 64, exact=False)
    ratio = (56 / 64 / NIC) / (63 / 64 / NVLINK)  # what leaves a node by one port, beside a ring within nodes
    assert far.gradients / near.gradients == pytest.approx(ratio, rel=0.02)
    assert ratio > 4


def test_parameters_of_the_models() -> None:
    billions = {name: model.shape.num_parameters / 1e9 for name, model in MODELS.items()}
    assert billions == {
        "qwen3-1.7b": pytest.approx(1.72, abs=0.01),
        "qwen3-8b": pytest.approx(8.19, abs=0.01),
        "qwen3-32b": pytest.approx(32.8, abs=0.1),
        "llama3.1-70b": pytest.approx(70.6, abs=0.1),
        "qwen3-30b-a3b": pytest.approx(30.5, abs=0.1),
        "qwen3-235b-a22b": pytest.approx(235, abs=1),
    }
    assert MODELS["qwen3-30b-a3b"].active_parameters / 1e9 == pytest.approx(3.0, abs=0.2)
    assert MODELS["qwen3-235b-a22b"].active_parameters / 1e9 == pytest.approx(21.6, abs=0.5)


def test_check_fails_beyond_its_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    half = replace(ONE, sequences=256, generation=13.0, update=12.0)
    expected = predict(half, ONE.model, 2)
    two = replace(half, generation=expected.generation, update=expected.update, sync=expected.sync, rest=expected.rest)
    assert check(ONE, two, 2, 0.01) == []
    wrong = check(ONE, replace(two, update=1.3 * two.update), 2, 0.15)
    assert [line.split(":")[0] for line in wrong] == ["2 GPUs, update"]
    assert "ratio 1.000" in capsys.readouterr().out


def test_a_larger_model_and_more_gpus_are_held_against_one_gpu(tmp_path: Path) -> None:
    """The 8 B model's GPU reads and computes more; its share of the batch on 4 GPUs is a quarter of that on 1."""
    work = replace(ONE, model=MODELS["qwen3-8b"], sequences=32, token_budget=8192)
    expected = predict(at(ONE, work), work.model, 4)
    assert at(ONE, ONE) == ONE
    assert expected.generation > at(ONE, work).generation
    parts = {"gen": expected.generation, "update_actor": expected.update, "update_weights": expected.sync}
    run = {
        **{"gpus": 4, "layout": "colocated", "steps": 3, "tokens_sampled": 3 * 4 * 32 * 1024},
        **{"prompt_tokens": 512.0, "response_tokens": 1024.0, "seconds": parts | {"step": expected.step}},
    }
    report = {"shape": "qwen3-8b", "token_budget": 8192, "max_num_seqs": 256, "runs": {"4 colocated": run}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert check_file(ONE, tmp_path / "report.json", 0.001) == 0
    run["seconds"]["update_actor"] *= 2
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert check_file(ONE, tmp_path / "report.json", 0.15) == 1


def test_the_tables_name_every_model_and_count() -> None:
    lines = scale_model.tables(ONE, [8, 512]).splitlines()
    assert len(lines) == 1 + 2 * len(MODELS)
    assert "GiB" in lines[1]
    told = dict(line.split(": ", 1) for line in scale_model.costs(ONE, [8, 512]).splitlines())
    assert told["qwen3-1.7b"] == "saves at least 11%"
    assert told["qwen3-235b-a22b"].startswith("exactness costs on 512 GPUs +")
