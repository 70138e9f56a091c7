"""The benchmarks of whole runs still run: small, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from processes import PATIENCE_S, until

from benchmarks.multi_gpu import scale_model
from benchmarks.multi_gpu.scale_shapes import MODELS
from benchmarks.trainer import grpo_run, plot_run
from vexact.report.html import read_run

ROOT = Path(__file__).resolve().parents[2]


def test_a_plot_has_the_steps_that_have_the_metric(tmp_path: Path) -> None:
    rows = [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 3, "b": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert plot_run.series(run, "a") == ([2], [1.0])
    assert plot_run.series(run, "b") == ([3], [2.0])
    assert plot_run.series(run, "c") == ([], [])


WRITER = """
import sys, time
while True:
    with open(sys.argv[1], "a") as file: file.write('{"actor/loss": 0, "timing_s/step": 1}\\n')
    time.sleep(0.1)
"""


def test_a_run_is_stopped_after_its_steps_or_when_the_time_is_up(tmp_path: Path) -> None:
    rows = tmp_path / "metrics.jsonl"
    for more, stop_after, expected in ((PATIENCE_S, 3, 0), (0.5, None, "none before the time was up")):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(rows)], stderr=subprocess.DEVNULL) as process:
            assert grpo_run.wait(process, rows, time.monotonic() + more, stop_after) == expected
            assert process.wait(PATIENCE_S) < 0
    assert len(rows.read_text().splitlines()) >= 3


LEAVER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: pathlib.Path(sys.argv[2]).touch())
row = '{"actor/loss": 0, "timing_s/step": 1}'
pathlib.Path(sys.argv[1]).write_text(f"{row}\\n{row}")
while True:
    time.sleep(0.1)
"""


def test_a_run_that_has_its_steps_is_done_though_the_time_is_up_while_it_leaves(tmp_path: Path, monkeypatch) -> None:
    """It may have to free a lot of page-locked memory."""
    rows, leaving = tmp_path / "metrics.jsonl", tmp_path / "leaving"
    clock = SimpleNamespace(monotonic=lambda: float(leaving.exists()), sleep=time.sleep)
    monkeypatch.setattr(grpo_run, "time", clock)
    for deadline, stop_after, expected in ((0.5, 1, 0), (-1.0, 1, 0), (-1.0, 2, "none before the time was up")):
        leaving.unlink(missing_ok=True)
        rows.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", LEAVER, str(rows), str(leaving)]) as process:
            assert until(lambda: rows.is_file() and rows.stat().st_size > 0)
            assert grpo_run.wait(process, rows, deadline, stop_after) == expected, "half a row is no step"
            assert process.wait(PATIENCE_S) == -signal.SIGKILL


def ran(script: str, out: Path, *arguments: str) -> dict:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--shape", "tiny", "--steps", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(json.loads(out.read_text()))


def test_a_step_is_compared_with_what_others_pay(tmp_path: Path) -> None:
    report = ran("trainer.step_cost", tmp_path / "report.json", "--runs", "exact", "recompute")
    exact, recompute = report["runs"]["exact"], report["runs"]["recompute"]
    assert exact["tokens_compared"] == recompute["tokens_compared"] == exact["tokens_sampled"] == 512
    assert exact["grad_norm"] == recompute["grad_norm"]
    assert "old_log_prob" in recompute["seconds"]
    assert report["exact_over"]["recompute"]["old_log_prob_s"] < 0


def test_layouts_are_measured_and_their_state_hashed(tmp_path: Path) -> None:
    """Of a checkpoint, and in memory: by one rank, and by two of which each has a part."""
    place = ["--work", str(tmp_path / "work"), "--keep"]
    report = ran("multi_gpu.steps", tmp_path / "report.json", "--runs", "1", *place)
    (run,) = report["runs"].values()
    assert (run["tokens_compared"], run["tokens_different"], report["problems"]) == (512, 0, [])
    assert len(run["weights_sha256"]) == len(run["moments_sha256"]) == 64
    written = (tmp_path / "work" / "model" / "config.json").stat().st_mtime_ns
    unsaved = ran("multi_gpu.steps", tmp_path / "unsaved.json", "--runs", "1", "2+1", "--digest", "memory", *place)
    assert (tmp_path / "work" / "model" / "config.json").stat().st_mtime_ns == written, "the model was kept"
    for name in ("1 colocated", "2+1 disaggregated"):
        assert all(unsaved["runs"][name][key] == run[key] for key in ("weights_sha256", "moments_sha256", "grad_norm"))
        assert not list((tmp_path / "work").glob(f"{name.replace(' ', '-')}/checkpoints/step_*"))
    assert scale_model.read_measured(tmp_path / "report.json", "1 colocated", MODELS["qwen3-1.7b"]).sequences == 16
