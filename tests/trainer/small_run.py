"""The overrides that every small run of these tests shares."""

from __future__ import annotations

from pathlib import Path


def small_run(tiny: Path, directory: Path) -> list[str]:
    """4 prompts x 4 samples of 12 tokens a step, from the fixture ``tiny``, into ``directory``."""
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
        f"trainer.default_local_dir={directory}",
    ]
