"""Random settings, small: whatever an engine is told, the training forward gives its bits; and the program can tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rollout import rescore


def test_every_way_to_sample_has_the_bits_of_the_training_forward(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    assert rescore.main(["--tokens", "2100", "--seed", "2", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["tokens_rescored"] >= 2100
    assert report["log_probs_different"] == 0
    assert report["tokens_compared_across_settings"] > 1000
    assert set(report["rounds"]) == set(rescore.WAYS)
    assert all(report["events"][name] for name in ("preemptions", "aborts", "tokens over HTTP"))
    assert report["rounds_with"]["async_scheduling"] < sum(report["rounds"].values())


def test_one_weight_that_differs_by_a_unit_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert rescore.main(["--tokens", "50", "--control"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["log_probs_different"] <= report["tokens_rescored"]


def test_bits_that_are_equal() -> None:
    first = np.array([0.0, 1.0, np.nan], np.float32)
    assert rescore.equal_bits(first, first.copy()) == 3
    assert (
        rescore.equal_bits(first, np.array([-0.0, np.nextafter(np.float32(1), np.float32(2)), np.nan], np.float32)) == 1
    )
