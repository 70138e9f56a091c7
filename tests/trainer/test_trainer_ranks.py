"""A run on several processes is the run on one: the same samples, the same weights and moments, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
from torchrun_support import torchrun

from vexact.config import load_config
from vexact.trainer.checkpoint import load_checkpoint
from vexact.trainer.launch import run

STEPS = 4
COMMON = (
    f"trainer.total_training_steps={STEPS}",
    "trainer.samples_per_step=-1",
    "trainer.save_freq=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
    "actor_rollout_ref.actor.use_kl_loss=true",
)


def digest(run_dir: Path, step: int = STEPS) -> str:
    """SHA-256 of every weight and moment of a checkpoint, by name."""
    _, state = load_checkpoint(run_dir / "checkpoints" / f"step_{step}")
    sha = hashlib.sha256(str(state["num_updates"]).encode())
    for name, saved in sorted(state["parameters"].items()):
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            sha.update(f"{name} {key} {saved['num_steps']}".encode() + saved[key].numpy().tobytes())
    return sha.hexdigest()


def samples(run_dir: Path) -> list[dict]:
    files = [run_dir / "samples" / f"step_{step}.jsonl" for step in range(1, STEPS + 1)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train(processes: int, arguments: list[str], *, check: bool = True, **variables: str) -> str:
    """`vexact train` under torchrun; its output."""
    code, output = torchrun(processes, ["-m", "vexact", "train", *arguments], **variables)
    assert not check or code == 0, output
    return output


@pytest.fixture(scope="module")
def one_process(tiny, tmp_path_factory):
    """The run that all others must equal."""
    directory = tmp_path_factory.mktemp("one") / "run"
    assert run(load_config(arguments(tiny, directory))) == 0
    return directory


def arguments(tiny: Path, directory: Path, *more: str) -> list[str]:
    return [
        f"actor_rollout_ref.model.path={tiny / 'model'}",
        f"data.train_files={tiny / 'train.jsonl'}",
        f"reward.custom_reward_function.path={tiny / 'reward.py'}",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "data.train_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "reward.num_workers=1",
        "trainer.logger=[jsonl]",
        f"trainer.default_local_dir={directory}",
        *COMMON,
        *more,
    ]


def assert_same_run(directory: Path, one_process: Path) -> None:
    assert samples(directory) == samples(one_process)
    for row, expected in zip(rows(directory), rows(one_process), strict=True):
        assert row["bitwise/tokens_different"] == row["training/rollout_probs_diff_max"] == 0
        for key in ("bitwise/tokens_compared", "critic/score/mean", "response_length/mean", "rollout/num_tokens"):
            assert row[key] == expected[key], key
        assert row["actor/grad_norm"] == expected["actor/grad_norm"]
    assert digest(directory) == digest(one_process)


@pytest.mark.parametrize(("processes", "more"), [(2, ()), (3, ("trainer.rollout_gpus=1",)), (4, ())])
def test_torchrun_gives_the_weights_of_one_process(processes, more, tiny, one_process, tmp_path):
    output = train(processes, arguments(tiny, tmp_path / "run", *more))
    assert_same_run(tmp_path / "run", one_process)
    assert output.count("done: steps 1 to") <= 1, output


def test_ray_gives_the_weights_of_one_process(tiny, one_process, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run(load_config(arguments(tiny, tmp_path / "run", "trainer.n_gpus_per_node=2"))) == 0
    assert_same_run(tmp_path / "run", one_process)
