"""One run of the study: train, score the trained weights by exact sampling, keep the curves, leave nothing else."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from grid import AXES, RunSpec

from vexact import cli

ROW, LOG = "row.json", "log.txt"
CURVES = {
    "reward": "critic/score/mean",
    "grad_norm": "actor/grad_norm",
    "entropy": "actor/entropy",
    "k3_kl": "rollout_corr/k3_kl",
    "probs_diff": "training/rollout_probs_diff_mean",
    "tokens_compared": "bitwise/tokens_compared",
    "tokens_different": "bitwise/tokens_different",
    "routes_different": "bitwise/routes_different",
    "ppo_kl": "actor/ppo_kl",
    "clip_fraction": "actor/pg_clipfrac",
    "effective_samples": "rollout_corr/rollout_is_eff_sample_size",
    "rejected": "rollout_corr/rollout_rs_masked_fraction",
    "skipped_steps": "actor/skipped_steps",
    "length": "response_length/mean",
}
"""Columns of the results, and the metrics that they hold of every step."""

_LAUNCHER = ("-m", "torch.distributed.run", "--standalone")


def run_and_record(spec: RunSpec, directory: Path) -> None:
    """Does the run in ``directory``, which it empties first, and writes its row there last of all.

    A training that stops itself (exit code 1 or 2) is an outcome and has a row; one that a signal ends has none, so
    that the study repeats it.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with open(directory / LOG, "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    started, clock = time.monotonic(), os.times()
    code = _train(spec, directory / "train")
    curves = read_curves(directory / "train")
    row: dict[str, Any] = {axis: getattr(spec, axis) for axis in AXES} | {
        "id": spec.id,
        "part": spec.part,
        "steps": spec.steps,
    }
    row |= {"status": "done", "exact_score": math.nan}
    if code == 0:
        row["exact_score"] = _exact_score(spec, directory)
    elif code in (1, 2) and curves["reward"]:
        row["status"] = "stopped: " + _last_line(directory / LOG)
    else:
        raise SystemExit(f"{spec.id} ended with exit code {code}; see {directory / LOG}")
    ended = os.times()
    row |= {
        "wall_s": time.monotonic() - started,
        "cpu_s": sum(ended[:4]) - sum(clock[:4]),
        "environment": (directory / "train" / "environment.json").read_text(encoding="utf-8"),
        **curves,
    }
    shutil.rmtree(directory / "train" / "checkpoints", ignore_errors=True)
    (directory / f".{ROW}").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (directory / f".{ROW}").rename(directory / ROW)


def _train(spec: RunSpec, directory: Path) -> int:
    overrides = [*spec.overrides, f"trainer.default_local_dir={directory}"]
    if spec.processes == 1:
        return cli.main(["train", *overrides])
    launch = [sys.executable, *_LAUNCHER, f"--nproc-per-node={spec.processes}", "-m", "vexact", "train", *overrides]
    return subprocess.run(launch, check=False).returncode


def _exact_score(spec: RunSpec, directory: Path) -> float:
    """Mean score of samples of the held-out prompts by the trained weights, without any mismatch."""
    (checkpoint,) = (directory / "train" / "checkpoints").glob("step_*")
    overrides = [
        *spec.exact,
        "trainer.val_only=true",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={checkpoint}",
        f"trainer.default_local_dir={directory / 'exact'}",
    ]
    if (code := cli.main(["train", *overrides])) != 0:
        raise SystemExit(f"{spec.id}: the validation ended with exit code {code}; see {directory / LOG}")
    (row,) = _rows(directory / "exact")
    (score,) = (value for name, value in row.items() if name.startswith("val-") and "/reward/mean@" in name)
    return float(score)


def read_curves(run: Path) -> dict[str, list[float]]:
    """The curves of a run directory, a value per step; NaN where the step has no such metric."""
    steps = [row for row in _rows(run) if CURVES["reward"] in row]
    return {
        column: [math.nan if row.get(metric) is None else float(row[metric]) for row in steps]
        for column, metric in CURVES.items()
    }


def _rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
