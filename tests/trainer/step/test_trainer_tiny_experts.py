"""The tiny models with experts, from `vexact prepare` to a checkpoint that transformers reads: what a user would do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from run_results import digest, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from vexact.cli import main
from vexact.prepare import prepare

PROMPTS = ["7+8=", "17+15=", "0+0=", "3+19="]


class Made(NamedTuple):
    """A tiny model and its data, a run of three steps, and one that was broken after two."""

    name: str
    data: Path
    runs: Path

    @property
    def checkpoint(self) -> Path:
        return self.runs / "whole" / "checkpoints" / "step_3"


@pytest.fixture(scope="module", params=["tiny_moe", "tiny_moonlight"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    made = Made(request.param, prepare(request.param, root / "data"), root)
    for run, steps in (("whole", 3), ("broken", 2), ("broken", 3)):
        assert main(["train", *overrides(made, run, steps)]) == 0
    return made


def overrides(made: Made, run: str, steps: int) -> list[str]:
    return [
        f"recipe={made.name}",
        f"actor_rollout_ref.model.path={made.data / 'model'}",
        f"data.train_files={made.data / 'train.parquet'}",
        f"data.val_files={made.data / 'test.parquet'}",
        f"trainer.default_local_dir={made.runs / run}",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=1",
        "trainer.logger=[jsonl]",
        "trainer.device=cpu",
        "reward.num_workers=1",
    ]


def test_a_run_starts_low_and_is_exact_with_experts_in_use(made: Made) -> None:
    steps = [row for row in rows(made.runs / "whole") if row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert 0.2 <= steps[0]["critic/score/mean"] <= 0.35
    for row in steps:
        assert row["bitwise/tokens_different"] == row["bitwise/routes_different"] == 0
        assert row["bitwise/routes_compared"] == row["bitwise/tokens_compared"] == row["rollout/num_tokens"] > 256
        assert row["actor/grad_norm"] > 0
        assert row["actor/moe_idle_experts"] == 0
        assert row["actor/moe_load_max_over_mean"] < 2, "all eight experts have work; two could have all of it: 4"


def test_a_broken_run_ends_with_the_weights_of_a_whole_one(made: Made) -> None:
    assert digest(made.runs / "broken", 3) == digest(made.runs / "whole", 3)


def test_the_checkpoint_is_verified(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    small = ["--num_prompts", "6", "--max_new_tokens", "5", "--device", "cpu", "--out", str(out)]
    assert main(["verify", "--model_path", str(made.checkpoint), *small]) == 0
    report = json.loads(out.read_text())
    assert report["passed"]
    assert report["bits"]["tokens"] == 30


def test_transformers_reads_the_checkpoint_and_gives_the_same_answers(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [text for prompt in PROMPTS for text in ("--prompt", prompt)]
    assert (
        main(["generate", "--model_path", str(made.checkpoint), "--device", "cpu", "--max_tokens", "6", *prompts]) == 0
    )
    answers = capsys.readouterr().out.splitlines()
    tokenizer = AutoTokenizer.from_pretrained(made.checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(made.checkpoint, dtype=torch.float32).eval()
    assert type(theirs).__name__ == {"tiny_moe": "Qwen3MoeForCausalLM"}.get(made.name, "DeepseekV3ForCausalLM")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        tokens = theirs.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == answer
    assert [int(answer) for answer in answers], "numbers"
