"""Our trainer on vLLM's samples: it runs, and it is not exact."""

import json
import os
import subprocess
import sys

import numpy as np


def test_four_steps_differ_in_last_bits_only(settings, tmp_path):
    run = tmp_path / "run"
    command = settings("trainer.total_training_steps=4", f"trainer.default_local_dir={run}")
    done = subprocess.run(
        [sys.executable, "-m", "vexact", "train", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "bitwise/tokens_compared" in row]
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["bitwise/tokens_different"] <= row["bitwise/tokens_compared"] == row["rollout/num_tokens"]
        assert 0 < row["training/rollout_probs_diff_max"] < 1e-4
        assert row["training/rollout_actor_probs_pearson_corr"] > 0.999999
        assert np.isfinite(row["actor/grad_norm"])
        assert row["rollout/weights_bytes"] > 0
