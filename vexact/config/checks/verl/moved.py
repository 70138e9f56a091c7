"""Keys that are called something else here, and sections that lie somewhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_ACTOR = "actor_rollout_ref.actor"
_ROLLOUT = "actor_rollout_ref.rollout"

MOVED: Mapping[str, str] = {
    "global_profiler.steps": "trainer.profile_steps",
    "trainer.max_actor_ckpt_to_keep": "trainer.keep_last",
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.overlong_buffer": "reward.reward_kwargs.overlong_buffer_cfg",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.sandbox_fusion": "reward.sandbox_fusion",
    "sandbox_fusion": "reward.sandbox_fusion",
    "actor_rollout_ref.ref.rollout_n": f"{_ROLLOUT}.n",
    f"{_ROLLOUT}.prompt_length": "data.max_prompt_length",
    f"{_ROLLOUT}.response_length": "data.max_response_length",
    f"{_ACTOR}.rollout_n": f"{_ROLLOUT}.n",
    f"{_ACTOR}.fsdp_config.ulysses_sequence_parallel_size": f"{_ACTOR}.ulysses_sequence_parallel_size",
    f"{_ACTOR}.optim.clip_grad": f"{_ACTOR}.grad_clip",
    f"{_ACTOR}.optim.warmup_style": f"{_ACTOR}.optim.lr_scheduler_type",
    f"{_ACTOR}.veomni.attn_implementation": f"{_ACTOR}.attn_implementation",
}
"""verl's name to ours, of keys and of whole sections."""


def here(key: str) -> str:
    """Our name of a key; its own where it has no other."""
    for theirs, ours in MOVED.items():
        if key == theirs or key.startswith(f"{theirs}."):
            return ours + key[len(theirs) :]
    return key


def moved_keys(keys: Iterable[str]) -> dict[str, str]:
    """verl's other names of ``keys``, each with ours."""
    return {
        theirs + key[len(ours) :]: key
        for key in keys
        for theirs, ours in MOVED.items()
        if key == ours or key.startswith(f"{ours}.")
    }
