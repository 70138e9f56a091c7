"""The command line of a small run, and what its console has to look like at the end."""

from __future__ import annotations

import re
from pathlib import Path

STEPS = 3
BACKGROUND = "actor_rollout_ref.actor.checkpoint.async_save=true"


def arguments(tiny: Path, directory: Path, *more: str) -> list[str]:
    """Of `vexact train`: a checkpoint at every step."""
    return [
        f"actor_rollout_ref.model.path={tiny / 'model'}",
        f"data.train_files={tiny / 'train.jsonl'}",
        f"reward.custom_reward_function.path={tiny / 'reward.py'}",
        "data.max_prompt_length=16",
        "data.max_response_length=12",
        "data.train_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
        "reward.num_workers=1",
        "trainer.save_freq=1",
        "trainer.device=cpu",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={directory}",
        *more,
    ]


def goes_on_after(step: int, directory: Path) -> str:
    """What an interrupted run says last, as a regular expression."""
    return re.escape(f"step {step} is saved in {directory}: the same command goes on from there")


def assert_whole(directory: Path, *steps: int) -> None:
    """These checkpoints are there, and no part of another."""
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [f"step_{step}" for step in steps]


def assert_readable(output: str, *last: str) -> None:
    """The console ends with these lines, regular expressions, and shows no traceback."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line][-len(last) :] if last else []
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(last, lines, strict=True)), output
