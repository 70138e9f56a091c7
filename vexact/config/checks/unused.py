"""Keys that are set and do nothing, because of the value of another one: said, as nothing is ignored in silence."""

from __future__ import annotations

from collections.abc import Iterator

from vexact.config.schema import Config

_ACTOR, _ROLLOUT, _TRAINER = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "trainer"


def unused_notices(config: Config) -> list[str]:
    """A notice for every key that has another value than its default and no effect."""
    changed = config.changed()
    return [
        f"{key}={value} has no effect: {reason}"
        for keys, is_off, reason in _switches(config)
        if is_off
        for key, value in changed.items()
        if any(key == name or key.startswith(f"{name}.") for name in keys)
    ]


def _switches(config: Config) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Keys, whether they are switched off, and by what."""
    actor, algorithm, trainer, optim = config.actor, config.algorithm, config.trainer, config.actor.optim
    clipping = tuple(f"{_ACTOR}.clip_ratio{end}" for end in ("", "_low", "_high", "_c"))
    yield (
        (f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"),
        not actor.use_kl_loss,
        f"{_ACTOR}.use_kl_loss is false",
    )
    yield (
        ("algorithm.kl_ctrl.kl_coef", "algorithm.kl_penalty"),
        not algorithm.use_kl_in_reward,
        "algorithm.use_kl_in_reward is false",
    )
    yield (
        ("algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches"),
        not algorithm.filter_groups.enable,
        "algorithm.filter_groups.enable is false",
    )
    yield (
        ("algorithm.gamma",),
        algorithm.adv_estimator != "reinforce_plus_plus",
        f"algorithm.adv_estimator={algorithm.adv_estimator} does not discount",
    )
    yield (
        ("algorithm.norm_adv_by_std_in_grpo",),
        algorithm.adv_estimator not in ("grpo", "dr_grpo"),
        f"algorithm.adv_estimator={algorithm.adv_estimator} is not grpo",
    )
    yield (
        ("algorithm.rollout_correction.rollout_is_threshold",),
        algorithm.rollout_correction.rollout_is is None,
        "algorithm.rollout_correction.rollout_is is null",
    )
    yield (
        (f"{_ACTOR}.clip_ratio",),
        None not in (actor.clip_ratio_low, actor.clip_ratio_high) and config.loss_mode != "reinforce",
        f"{_ACTOR}.clip_ratio_low and clip_ratio_high are given",
    )
    yield (f"{_ACTOR}.clip_ratio_c",), config.loss_mode == "gspo", "the gspo loss has no dual clip"
    yield clipping, config.loss_mode == "reinforce", "the reinforce loss does not clip"
    yield (
        (f"{_ACTOR}.loss_scale_factor",),
        actor.loss_agg_mode != "seq-mean-token-sum-norm",
        f"{_ACTOR}.loss_agg_mode={actor.loss_agg_mode} divides by no such factor",
    )
    yield (
        (f"{_ACTOR}.optim.lr_warmup_steps_ratio",),
        optim.lr_warmup_steps >= 0,
        f"{_ACTOR}.optim.lr_warmup_steps={optim.lr_warmup_steps} says it already",
    )
    yield (
        (f"{_ACTOR}.optim.min_lr_ratio",),
        optim.lr_scheduler_type == "constant",
        f"{_ACTOR}.optim.lr_scheduler_type=constant has no end",
    )
    buffer = "reward.reward_kwargs.overlong_buffer_cfg"
    yield (
        (f"{buffer}.len", f"{buffer}.penalty_factor", "reward.reward_kwargs.max_resp_len"),
        not config.reward.reward_kwargs.overlong_buffer_cfg.enable,
        f"{buffer}.enable is false",
    )
    yield (
        tuple(f"{_ROLLOUT}.val_kwargs.{name}" for name in ("temperature", "top_p", "top_k", "min_p")),
        not config.rollout.val_kwargs.do_sample,
        f"validation is greedy, as {_ROLLOUT}.val_kwargs.do_sample is false",
    )
    yield (
        ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",),
        not config.needs_reference,
        "no KL term is on, so there is no reference policy",
    )
    yield (
        ("actor_rollout_ref.model.recompute_num_layers",),
        not config.model.enable_gradient_checkpointing,
        "actor_rollout_ref.model.enable_gradient_checkpointing=false recomputes none",
    )
    yield (
        (f"{_ROLLOUT}.kv_cache_bytes",),
        config.rollout.num_pages is not None,
        f"{_ROLLOUT}.num_pages={config.rollout.num_pages} says it already",
    )
    yield (
        (f"{_ROLLOUT}.cudagraph_capture_sizes",),
        config.rollout.enforce_eager,
        f"{_ROLLOUT}.enforce_eager=true turns CUDA graphs off",
    )
    yield (
        ("data.truncation",),
        config.data.filter_overlong_prompts,
        "data.filter_overlong_prompts=true leaves no longer prompt",
    )
    yield (
        ("data.val_max_samples", f"{_TRAINER}.test_freq"),
        not config.data.val_files,
        "data.val_files is empty",
    )
    yield (
        (f"{_TRAINER}.total_epochs",),
        trainer.total_training_steps is not None,
        f"{_TRAINER}.total_training_steps={trainer.total_training_steps} says it already",
    )
    yield (f"{_TRAINER}.best_metric_mode",), trainer.best_metric is None, f"{_TRAINER}.best_metric is null"
    yield (f"{_TRAINER}.async_audit_freq",), not trainer.async_steps, f"{_TRAINER}.async_steps=0"
    yield (
        (f"{_TRAINER}.audit_redraw_ratio", f"{_TRAINER}.audit_every_token_freq"),
        trainer.exactness == "off",
        f"{_TRAINER}.exactness=off compares nothing",
    )
    yield (f"{_TRAINER}.profile_ranks",), not trainer.profile_steps, f"{_TRAINER}.profile_steps names no step"
    yield (
        ("reward.custom_reward_function.name", "reward.custom_reward_function.reward_kwargs"),
        config.reward.custom_reward_function.path is None,
        "reward.custom_reward_function.path is null",
    )
