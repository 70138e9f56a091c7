"""Which configuration keys decide the bits of a run, and with what value in force."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vexact.config import Config
from vexact.config.fields import flatten
from vexact.config.sections.rollout_correction import KEY as CORRECTION

MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
OVERLONG = "reward.reward_kwargs.max_resp_len"
OVERLONG_BUFFER = "reward.reward_kwargs.overlong_buffer_cfg"

COVERED = {
    "rows": (
        "data.train_files",
        "data.train_max_samples",
        "data.prompt_key",
        "data.answer_key",
        "data.reward_fn_key",
        "data.max_prompt_length",
        "data.truncation",
        "data.filter_overlong_prompts",
        "data.apply_chat_template_kwargs",
    ),
    "model": (f"{MODEL}.path",),
    "tokenizer": (f"{MODEL}.tokenizer_path", f"{MODEL}.custom_chat_template"),
    "reward": (
        "reward.custom_reward_function.path",
        "reward.custom_reward_function.name",
        "reward.custom_reward_function.reward_kwargs",
    ),
}
"""Keys whose effect is compared itself: a file that moved is the same data."""

_FREE = (
    "trainer",  # but for seed, device, async_steps and the number of steps, which deciding_settings states
    "data.val_files",
    "data.val_max_samples",
    f"{MODEL}.enable_gradient_checkpointing",
    f"{MODEL}.recompute_num_layers",
    f"{ACTOR}.strategy",
    f"{ACTOR}.fsdp_config",
    f"{ACTOR}.checkpoint",
    f"{ROLLOUT}.dtype",
    f"{ROLLOUT}.page_size",
    f"{ROLLOUT}.num_pages",
    f"{ROLLOUT}.kv_cache_bytes",
    f"{ROLLOUT}.gpu_memory_utilization",
    f"{ROLLOUT}.free_cache_engine",
    f"{ROLLOUT}.enable_sleep_mode",
    f"{ROLLOUT}.max_num_seqs",
    f"{ROLLOUT}.max_num_batched_tokens",
    f"{ROLLOUT}.max_model_len",
    f"{ROLLOUT}.enable_chunked_prefill",
    f"{ROLLOUT}.enable_prefix_caching",
    f"{ROLLOUT}.async_scheduling",
    f"{ROLLOUT}.enforce_eager",
    f"{ROLLOUT}.cudagraph_capture_sizes",
    f"{ROLLOUT}.val_kwargs",
    "actor_rollout_ref.ref",
    "algorithm.filter_groups.max_num_gen_batches",
    "reward.reward_manager",
    "reward.num_workers",
    "reward.timeout_s",
    "reward.sandbox.memory_gb",
)
"""Keys and sections that never change a result; a key that nobody put here is taken to matter."""

_OF_VALIDATION = ("data.val_files", "data.val_max_samples", f"{ROLLOUT}.val_kwargs")
_OF_TRAINING = (
    *("data.train_files", "data.train_max_samples", "data.train_batch_size", "data.shuffle", "data.seed"),
    *(f"{MODEL}.path", ACTOR, "algorithm", "reward.reward_kwargs"),
    *(f"{ROLLOUT}.{name}" for name in ("n", "temperature", "top_p", "top_k", "min_p")),
)

_IN_FORCE = (
    f"{ACTOR}.clip_ratio",
    f"{ACTOR}.clip_ratio_low",
    f"{ACTOR}.clip_ratio_high",
    f"{ACTOR}.ppo_mini_batch_size",
    f"{ROLLOUT}.seed",
    "data.seed",
    OVERLONG,
)
"""Keys whose value in force takes another key into account; `deciding_settings` states that one."""


def deciding_settings(config: Config, device: str, total_steps: int) -> dict[str, Any]:
    """Dotted keys to the values in force. Those that have no effect under this configuration are left out.

    Args:
        device: "cpu" or "cuda".
        total_steps: of the whole run; it matters only to a schedule that ends with it.
    """
    covered = [key for keys in COVERED.values() for key in keys]
    unused = [*covered, *_FREE, *_IN_FORCE, *_switched_off(config)]
    decided = {key: value for key, value in flatten(config.to_dict()).items() if not is_one_of(key, unused)}
    decided |= {
        "trainer.seed": config.trainer.seed,
        "trainer.device": device,
        "trainer.async_steps": config.trainer.async_steps,
        f"{ROLLOUT}.dtype": config.dtype(device),
        f"{ROLLOUT}.seed": config.rollout_seed,
        "data.seed": config.data_seed,
        f"{ACTOR}.ppo_mini_batch_size": config.mini_batch_prompts,
        f"{ACTOR}.clip_ratio_low": config.actor.clip_low,
        f"{ACTOR}.clip_ratio_high": config.actor.clip_high,
    }
    if config.reward.reward_kwargs.overlong_buffer_cfg.enable:
        decided[OVERLONG] = config.overlong_length
    optim = config.actor.optim
    if optim.lr_scheduler_type != "constant" or (optim.lr_warmup_steps < 0 and optim.lr_warmup_steps_ratio > 0):
        decided["trainer.total_training_steps"] = total_steps
    return decided


def validation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a nested configuration to their values, those that the values of a validation depend on."""
    unused = [*(key for key in _FREE if key not in _OF_VALIDATION), *_OF_TRAINING]
    seed = "trainer.seed"
    return {key: value for key, value in flatten(config).items() if key == seed or not is_one_of(key, unused)}


def is_one_of(key: str, names: Iterable[str]) -> bool:
    """Whether ``key`` is one of ``names``, or lies in a section or mapping among them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _switched_off(config: Config) -> list[str]:
    """Keys without effect because of the value of another one, which is stated: else nobody would see it switched."""
    actor, algorithm, optim = config.actor, config.algorithm, config.actor.optim
    correction = algorithm.rollout_correction
    off = {
        f"{ACTOR}.kl_loss_coef": not actor.use_kl_loss,
        f"{ACTOR}.kl_loss_type": not actor.use_kl_loss,
        f"{CORRECTION}.rollout_is_threshold": correction.rollout_is is None,
        f"{CORRECTION}.rollout_is_batch_normalize": correction.rollout_is is None,
        f"{CORRECTION}.rollout_rs_threshold": correction.rollout_rs is None,
        f"{CORRECTION}.bypass_mode": not correction.is_on and correction.loss_type == "ppo_clip",
        "algorithm.kl_penalty": not algorithm.use_kl_in_reward,
        "algorithm.kl_ctrl": not algorithm.use_kl_in_reward,
        "algorithm.filter_groups.metric": not algorithm.filter_groups.enable,
        "algorithm.recompute_old_log_prob": config.trainer.exactness == "strict",  # it gives the bits that are there
        "algorithm.gamma": algorithm.adv_estimator != "reinforce_plus_plus",
        f"{OVERLONG_BUFFER}.len": not config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        f"{OVERLONG_BUFFER}.penalty_factor": not config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        f"{ACTOR}.optim.lr_warmup_steps_ratio": optim.lr_warmup_steps >= 0,
        f"{ACTOR}.optim.min_lr_ratio": optim.lr_scheduler_type == "constant",
    }
    return [key for key, is_off in off.items() if is_off]
