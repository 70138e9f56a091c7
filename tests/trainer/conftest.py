"""A tiny random model, a character tokenizer, additions as data and a reward that varies within every group."""

import json
import random
from pathlib import Path

import pytest
from small_run import small_run, write_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    odd = sum(c in "13579" for c in solution_str)
    return {"score": odd / max(1, len(solution_str)), "odd": odd}
"""


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = draw.randrange(50), draw.randrange(50)
            row = {"data_source": "sum", "prompt": f"{a}+{b}=", "reward_model": {"ground_truth": str(a + b)}}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Directory with model/, train.jsonl, test.jsonl and reward.py."""
    root = tmp_path_factory.mktemp("tiny")
    write_model(root / "model")
    write_rows(root / "train.jsonl", 40)
    write_rows(root / "test.jsonl", 4, seed=1)
    (root / "reward.py").write_text(REWARD)
    return root


@pytest.fixture
def overrides(tiny, tmp_path):
    """Overrides of a small run into tmp_path/run; a function that adds more."""

    def make(*more: str) -> list[str]:
        return [
            *small_run(tiny, tmp_path / "run"),
            "trainer.total_training_steps=3",
            "trainer.logger=[jsonl]",
            *more,
        ]

    return make


@pytest.fixture
def metrics(tmp_path):
    """Reads the run's metrics.jsonl."""

    def read(run: str = "run") -> list[dict]:
        return [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]

    return read
