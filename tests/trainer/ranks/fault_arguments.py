"""The command line of a small run, and what its console has to look like at the end."""

from __future__ import annotations

import re
from pathlib import Path

from small_run import small_run

STEPS = 3
BACKGROUND = "actor_rollout_ref.actor.checkpoint.async_save=true"


def arguments(tiny: Path, directory: Path, *more: str) -> list[str]:
    """Of `vexact train`: a checkpoint at every step."""
    return [
        *small_run(tiny, directory),
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
        "trainer.save_freq=1",
        "trainer.device=cpu",
        f"trainer.total_training_steps={STEPS}",
        *more,
    ]


def goes_on_after(step: int, directory: Path) -> str:
    """What an interrupted run says last, as a regular expression; step 0: when none is saved."""
    if step == 0:
        return "no step is saved yet: the same command starts anew"
    return re.escape(f"step {step} is saved in {directory}: the same command goes on from there")


def last_saved(output: str, directory: Path) -> int:
    """The step that an interrupted run says it goes on after; 0: none is saved."""
    said = [step for step in range(STEPS + 1) if re.search(goes_on_after(step, directory) + r"\n*\Z", output)]
    assert len(said) == 1, output
    return said[0]


def assert_whole(directory: Path, *steps: int) -> None:
    """These checkpoints are there, and no part of another."""
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [f"step_{step}" for step in steps]


def assert_readable(output: str, *last: str) -> None:
    """The console ends with these lines, regular expressions, and shows no traceback."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line][-len(last) :] if last else []
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(last, lines, strict=True)), output
