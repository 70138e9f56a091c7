"""The benchmarks of whole runs still run: small, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import plot_run
import pytest
import scale_model
from scale_shapes import MODELS

ROOT = Path(__file__).resolve().parents[2]


def test_plot_means_and_series(tmp_path: Path) -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 3, "b": 2.0}]
    assert plot_run.series(rows, "a") == ([2], [1.0])
    assert plot_run.smooth([0.0, 1.0, 2.0], 2) == [0.0, 0.5, 1.5]
    with pytest.raises(SystemExit, match="has no rows"):
        plot_run.read_rows(tmp_path)


def ran(script: str, out: Path, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--shape", "tiny", "--steps", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(out.read_text()))


def test_a_step_is_compared_with_what_others_pay(tmp_path: Path) -> None:
    report = ran("step_cost.py", tmp_path / "report.json", "--runs", "exact", "recompute")
    exact, recompute = report["runs"]["exact"], report["runs"]["recompute"]
    assert exact["tokens_compared"] == recompute["tokens_compared"] == exact["tokens_sampled"] == 512
    assert exact["grad_norm"] == recompute["grad_norm"]
    assert "old_log_prob" in recompute["seconds"]
    assert report["exact_over"]["recompute"]["old_log_prob_s"] < 0


def test_a_layout_is_measured_and_its_state_hashed(tmp_path: Path) -> None:
    report = ran("multi_gpu.py", tmp_path / "report.json", "--gpus", "1")
    (run,) = report["runs"].values()
    assert (run["tokens_compared"], run["tokens_different"], report["problems"]) == (512, 0, [])
    assert len(run["weights_sha256"]) == len(run["moments_sha256"]) == 64
    assert scale_model.read_measured(tmp_path / "report.json", "1 colocated", MODELS["qwen3-1.7b"]).sequences == 16
