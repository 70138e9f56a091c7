"""The Slurm script with stand-ins for Slurm and Ray: what it starts, whom it misses, and what it leaves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
# srun runs its command here, whatever node it names; ray notes what it was asked and then lasts, or is a job.
FAKES = {
    "scontrol": "printf '%s\\n' node-a node-b",
    "hostname": "echo 10.0.0.1 fe80::1",
    "srun": """
while [[ "$1" == -* ]]; do [[ "$1" != -w ]] || shift; shift; done
exec "$@" """,
    "ray": """
echo "ray $*" >>"$FAKE_LOG"
[[ "$1" != start ]] || { echo "ray runs"; exec sleep "${FAKE_RAY_LASTS:-60}"; }
exit "${FAKE_JOB_CODE:-0}" """,
    "python": 'cat >/dev/null; echo "node-a 8"; [[ -n "${FAKE_ALONE:-}" ]] || echo "node-b 8"',
}


def run(folder: Path, **variables: str) -> tuple[int, str, list[str]]:
    """The exit code of slurm.sh, its messages, and what Ray was asked."""
    for name, text in FAKES.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    log = folder / "log"
    log.touch()
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "HOME": str(folder),
        "FAKE_LOG": str(log),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "123",
        "SLURM_GPUS_ON_NODE": "8",
        "POLL_S": "0.1",
        **variables,
    }
    script = ROOT / "examples" / "multinode" / "slurm.sh"
    result = subprocess.run(
        ["bash", script, "recipe=x"], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert [path.name for path in folder.iterdir() if path.name.startswith(".ray-")] == [], "the token stays nowhere"
    return result.returncode, result.stderr, log.read_text().splitlines()


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_cluster_is_started_used_and_ended(tmp_path: Path, code: str) -> None:
    result, said, asked = run(tmp_path, FAKE_JOB_CODE=code)
    assert (result, "all 16 GPUs are there" in said) == (int(code), True), said
    starts = [line for line in asked if line.startswith("ray start")]
    assert any("--head --node-ip-address=10.0.0.1 --port=20123" in line for line in starts)
    assert any("--num-gpus=8 --address=10.0.0.1:20123" in line for line in starts)
    (job,) = (line for line in asked if line.startswith("ray job submit"))
    assert "--address=http://10.0.0.1:30123" in job
    assert job.endswith("-m vexact train trainer.nnodes=2 trainer.n_gpus_per_node=8 recipe=x")


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    result, said, asked = run(tmp_path, FAKE_ALONE="1", WAIT_S="2")
    assert result == 1
    assert "waiting for node-b (" in said
    assert said.splitlines()[-1] == "slurm: after 2 s still without: node-b"
    assert "ray runs" in said
    assert not [line for line in asked if line.startswith("ray job")]


def test_a_node_whose_ray_ends_is_named_at_once(tmp_path: Path) -> None:
    result, said, _ = run(tmp_path, FAKE_ALONE="1", FAKE_RAY_LASTS="0")
    assert result == 1
    assert said.splitlines()[-1] in {f"slurm: Ray ended on {node}" for node in ("node-a", "node-b")}  # it ends on both
