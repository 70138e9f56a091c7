"""VeOmni's trainer, FSDP2 over two processes, weights first on the meta device, its bf16 cast of inputs on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vexact.prepare.tiny import write_tiny, write_tiny_moe, write_tiny_moonlight

SCRIPT = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(params=[write_tiny, write_tiny_moe, write_tiny_moonlight], ids=["dense", "experts", "shared-experts"])
def task(tmp_path, request):
    root = tmp_path
    (root / "tiny").mkdir()
    request.param(root / "tiny", right_steps=1, doubtful_steps=1)
    rows = [json.dumps({"text": f"{i}+{3 * i}={4 * i} " * 6}) for i in range(64)]
    (root / "data.jsonl").write_text("\n".join(rows) + "\n")
    return root


def train(root):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [str(root / "tiny" / "model"), str(root / "data.jsonl"), str(root / "out")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_every_step_of_the_trainer_is_exact(task):
    out = train(task)
    assert re.findall(r"step (\d+): (\d+) of 79 differ", out) == [(str(step), "0") for step in range(1, 5)]
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+) gradient norm", out)]
    assert len(losses) == 4
    assert losses[3] < losses[0] - 0.1, "it learns"
