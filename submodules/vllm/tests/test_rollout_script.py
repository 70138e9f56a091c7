"""``benchmarks.rollout.throughput``: ours and vLLM do the same work, and only ours has the training forward's bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_our_engine_beside_vllm(tmp_path):
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "benchmarks.rollout.throughput", "--shape", "tiny", "--repeats", "1", "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--sides", "exact", "vllm"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(out.read_text())
    ours, theirs = record["sides"]["exact"], record["sides"]["vllm"]
    for side in (ours, theirs):
        assert side["limits"] == ours["limits"]
        assert list(side["rows"]) == ["1", "8"]
        assert all(row["tokens_per_s"] > 0 and row["seconds"] > 0 for row in side["rows"].values())
        assert side["against_training"]["log_probs_compared"] == 8 * record["new_tokens"]
    assert ours["against_training"]["log_probs_different"] == 0
    assert theirs["against_training"]["log_probs_different"] > 0
    assert theirs["against_training"]["max_log_prob_diff"] < 1e-4
    assert theirs["version"].startswith("vllm ")
