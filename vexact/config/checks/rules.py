"""Rules that tie several keys together."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from vexact.attention import TRITON_INVARIANT, attention_warning, check_attention
from vexact.config.checks.correction import correction_problems
from vexact.config.fields import ConfigError
from vexact.config.schema import Config
from vexact.config.sections.rollout import MIN_TEMPERATURE
from vexact.env import wandb_mode
from vexact.plugins import load_rollout

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
KWARGS = "reward.reward_kwargs"
TASK_PREFIX = "reasoning_gym:"


def check(config: Config) -> None:
    """
    Raises:
        ConfigError: keys contradict each other; all contradictions are named at once.
    """
    problems = [*_sources(config), *_batches(config), *_lengths(config), *_policy(config)]
    problems += [
        *_mismatch(config),
        *_counts(config),
        *_texts(config),
        *_run(config),
        *_sleep(config),
        *_foreign_rollout(config),
    ]
    problems += correction_problems(config, config.trainer.exactness == "strict" and not inexact(config))
    if problems:
        raise ConfigError("\n".join(problems))


def attention_notices(config: Config) -> list[str]:
    """A warning when rollout and trainer attention cannot agree; raises ValueError when one of them cannot be used."""
    rollout, trainer = config.rollout.attn_impl, config.actor.attn_implementation
    check_attention(rollout, f"{ROLLOUT}.attn_impl")
    check_attention(trainer, f"{ACTOR}.attn_implementation")
    warning = attention_warning(rollout, trainer)
    return [] if warning is None else [warning]


def inexact(config: Config) -> str:
    """The setting that rules exactness out by itself; empty for none."""
    if not config.rollout.is_own:
        return f"actor_rollout_ref.rollout.name={config.rollout.name}"
    if not config.rollout.batch_invariant:
        return "actor_rollout_ref.rollout.batch_invariant=false"
    if config.rollout.mismatch.mode != "none":
        return f"actor_rollout_ref.rollout.mismatch.mode={config.rollout.mismatch.mode}"
    rollout, trainer = config.rollout.attn_impl, config.actor.attn_implementation
    return f"attention {rollout} (rollout) with {trainer} (trainer)" if attention_warning(rollout, trainer) else ""


def _sources(config: Config) -> Iterator[str]:
    if not config.model.path:
        yield (
            "actor_rollout_ref.model.path is not set: give a checkpoint directory (config.json and safetensors), or "
            "make a small one with `vexact prepare tiny`"
        )
    elif not (Path(os.path.expanduser(config.model.path)) / "config.json").is_file():
        yield (
            f"actor_rollout_ref.model.path={config.model.path}: no config.json there; give a Hugging Face checkpoint "
            "directory, or make a small one with `vexact prepare tiny`"
        )
    if not config.data.train_files:
        yield (
            "data.train_files is not set: give a parquet or JSONL file, or a task such as "
            f"{TASK_PREFIX}chain_sum?size=2000&seed=1"
        )
    for key, files in (("train_files", config.data.train_files), ("val_files", config.data.val_files)):
        for name in files:
            if not name.startswith(TASK_PREFIX) and not Path(os.path.expanduser(name)).exists():
                yield f"data.{key}={name}: no such file; paths are relative to {Path.cwd()}"
    path = config.reward.custom_reward_function.path
    if path is not None and not Path(os.path.expanduser(path)).is_file():
        yield f"reward.custom_reward_function.path={path}: no such file"


def _batches(config: Config) -> Iterator[str]:
    batch, mini = config.data.train_batch_size, config.mini_batch_prompts
    if batch % mini:
        yield (
            f"{ACTOR}.ppo_mini_batch_size={mini} does not divide data.train_batch_size={batch}: every optimizer step "
            f"must see equally many prompts; try {_nearest_divisor(batch, mini)}"
        )
    grouped = config.algorithm.adv_estimator in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline")
    if grouped and config.rollout.n < 2:
        yield (
            f"{ROLLOUT}.n={config.rollout.n}: {config.algorithm.adv_estimator} compares the samples of a prompt with "
            "each other; use n of at least 2, or algorithm.adv_estimator=reinforce_plus_plus"
        )
    gpus = config.trainer.training_gpus
    parts = {
        "ulysses_sequence_parallel_size": config.actor.ulysses_sequence_parallel_size,
        "fsdp_config.expert_parallel_size": config.actor.fsdp_config.expert_parallel_size,
    }
    for key, size in parts.items():
        if gpus is not None and gpus % size:
            yield (
                f"{ACTOR}.{key}={size} does not divide the {gpus} training GPU(s) "
                f"(trainer.nnodes x trainer.n_gpus_per_node); try {_nearest_divisor(gpus, size)}, or train on a "
                f"multiple of {size} GPUs"
            )
    if config.algorithm.filter_groups.enable and config.rollout.n < 2:
        yield (
            f"algorithm.filter_groups.enable=true needs several samples per prompt, and {ROLLOUT}.n={config.rollout.n}"
        )


def _lengths(config: Config) -> Iterator[str]:
    data, rollout = config.data, config.rollout
    needed = data.max_prompt_length + data.max_response_length
    if config.max_model_len < needed:
        yield (
            f"{ROLLOUT}.max_model_len={config.max_model_len} is less than data.max_prompt_length + "
            f"data.max_response_length = {data.max_prompt_length} + {data.max_response_length} = {needed}; raise it or "
            "leave it null"
        )
    sharing = config.actor.ulysses_sequence_parallel_size
    times = "" if sharing == 1 else f" x {sharing} GPUs ({ACTOR}.ulysses_sequence_parallel_size)"
    least = -(-needed // sharing)
    if config.actor.ppo_max_token_len_per_gpu < least:
        yield (
            f"{ACTOR}.ppo_max_token_len_per_gpu={config.actor.ppo_max_token_len_per_gpu}{times} cannot hold one "
            f"sequence of {needed} tokens (data.max_prompt_length + data.max_response_length); set it to at least "
            f"{least}"
        )
    reference = config.ref.log_prob_max_token_len_per_gpu
    if config.needs_reference and reference is not None and reference < least:
        yield (
            f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={reference}{times} cannot hold one sequence of "
            f"{needed} tokens (data.max_prompt_length + data.max_response_length); set it to at least {least}, or to "
            "null"
        )
    if rollout.num_pages is not None and rollout.num_pages * rollout.page_size < config.max_model_len:
        yield (
            f"{ROLLOUT}.num_pages={rollout.num_pages} of {rollout.page_size} tokens cannot hold one sequence of "
            f"{config.max_model_len} tokens; set it to at least {-(-config.max_model_len // rollout.page_size)}"
        )
    if rollout.num_pages is not None and rollout.kv_cache_bytes is not None:
        yield f"{ROLLOUT}.num_pages and {ROLLOUT}.kv_cache_bytes both size the key-value cache; set one of them"
    if not rollout.enable_chunked_prefill and rollout.max_num_batched_tokens < config.max_model_len:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={rollout.max_num_batched_tokens} is less than one sequence of "
            f"{config.max_model_len} tokens and enable_chunked_prefill=false; raise it or turn chunking on"
        )
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg
    if overlong.enable and not 0 < overlong.len <= config.overlong_length:
        limit = (
            "data.max_response_length" if config.reward.reward_kwargs.max_resp_len is None else f"{KWARGS}.max_resp_len"
        )
        yield f"{KWARGS}.overlong_buffer_cfg.len={overlong.len} must lie between 1 and {limit}={config.overlong_length}"


def _policy(config: Config) -> Iterator[str]:
    actor, rollout = config.actor, config.rollout
    if len({actor.fsdp_config.dtype, rollout.dtype} - {"auto"}) > 1:
        yield (
            f"{ACTOR}.fsdp_config.dtype={actor.fsdp_config.dtype} and {ROLLOUT}.dtype={rollout.dtype} differ: trainer "
            "and rollout compute in one type; make them equal, or leave one of them auto (for a rollout that differs "
            f"on purpose, see {ROLLOUT}.mismatch.mode and batch_invariant)"
        )
    if len(actor.optim.betas) != 2:
        yield f"{ACTOR}.optim.betas={list(actor.optim.betas)}: AdamW takes two, e.g. '[0.9,0.999]'"
    if actor.clip_low >= 1:
        yield f"{ACTOR}.clip_ratio={actor.clip_low}: as lower range it must be below 1, the ratio cannot fall under 0"
    if 0 < rollout.val_kwargs.temperature < MIN_TEMPERATURE:
        yield (
            f"{ROLLOUT}.val_kwargs.temperature={rollout.val_kwargs.temperature}: must be 0 (greedy) or at least "
            f"{MIN_TEMPERATURE:g}"
        )
    if rollout.cudagraph_capture_sizes == ():
        yield f"{ROLLOUT}.cudagraph_capture_sizes=[]: enforce_eager=true turns CUDA graphs off; null takes a ladder"
    if rollout.val_kwargs.do_sample and rollout.val_kwargs.temperature == 0:
        yield (
            f"{ROLLOUT}.val_kwargs.do_sample=true with temperature=0 is greedy; set val_kwargs.temperature, e.g. "
            "1.0, or do_sample=false"
        )
    if rollout.val_kwargs.n > 1 and not rollout.val_kwargs.do_sample:
        yield (
            f"{ROLLOUT}.val_kwargs.n={rollout.val_kwargs.n} greedy samples would all be equal; set "
            "val_kwargs.do_sample=true and val_kwargs.temperature=1.0, or n=1"
        )


def _counts(config: Config) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    counts = {"data.train_max_samples": data.train_max_samples, "data.val_max_samples": data.val_max_samples}
    for key, value in counts.items():
        if value == 0:
            yield f"{key}=0: use -1 for all rows, or a number of rows"
    for name in ("save_freq", "test_freq", "audit_every_token_freq", "async_audit_freq"):
        if getattr(trainer, name) == 0:
            yield f"trainer.{name}=0: use -1 for never, or a number of steps"


def _texts(config: Config) -> Iterator[str]:
    names = {
        "trainer.project_name": config.trainer.project_name,
        "trainer.experiment_name": config.trainer.experiment_name,
        "data.prompt_key": config.data.prompt_key,
        "data.reward_fn_key": config.data.reward_fn_key,
        "reward.custom_reward_function.name": config.reward.custom_reward_function.name,
    }
    for key, name in names.items():
        if not name.strip() or not name.isprintable():
            yield f"{key}={name!r}: give it a name, on one line"
    for key in ("trainer.project_name", "trainer.experiment_name"):
        if config.trainer.default_local_dir is None and (
            Path(names[key]).is_absolute() or ".." in Path(names[key]).parts
        ):
            yield f"{key}={names[key]!r} leads out of runs/; set trainer.default_local_dir to name the run directory"
    if "" in config.rollout.stop:
        yield f"{ROLLOUT}.stop={list(config.rollout.stop)}: a stop string must not be empty"


def _mismatch(config: Config) -> Iterator[str]:
    rollout, dial = config.rollout, config.rollout.mismatch
    if dial.mode == "none":
        if dial.scale != 1.0:
            yield f"{ROLLOUT}.mismatch.scale={dial.scale} has no effect without {ROLLOUT}.mismatch.mode; set it"
        return
    if dial.mode != "noise" and dial.scale > 1:
        yield f"{ROLLOUT}.mismatch.scale={dial.scale}: {dial.mode} takes a share between 0 and 1"
    if not rollout.batch_invariant or rollout.attn_impl != TRITON_INVARIANT:
        yield (
            f"{ROLLOUT}.mismatch.mode={dial.mode} must be the only difference between rollout and trainer; leave "
            f"{ROLLOUT}.batch_invariant=true and attn_impl={TRITON_INVARIANT}"
        )


def _foreign_rollout(config: Config) -> Iterator[str]:
    """What the package that provides the rollout refuses, and that it is there."""
    if config.rollout.is_own:
        return
    try:
        load_rollout(config.rollout.name).check(config)
    except ValueError as error:
        yield str(error)


def _sleep(config: Config) -> Iterator[str]:
    rollout, apart = config.rollout, config.trainer.rollout_gpus
    key = f"{ROLLOUT}.enable_sleep_mode=true"
    if not rollout.enable_sleep_mode:
        return
    if apart is not None:
        yield (
            f"{key} with trainer.rollout_gpus={apart}: nothing trains on the GPUs that sample, so nobody needs their "
            "memory; leave it false"
        )
    if not rollout.free_cache_engine:
        yield f"{key} gives the key-value cache's memory as well; leave {ROLLOUT}.free_cache_engine=true"
    if not rollout.is_own:
        yield f"{key}: {ROLLOUT}.name={rollout.name} keeps its weights in its own way; leave it false"


def _run(config: Config) -> Iterator[str]:
    trainer = config.trainer
    if trainer.rollout_gpus is not None and trainer.n_gpus_per_node is not None:
        total = trainer.nnodes * trainer.n_gpus_per_node
        if trainer.rollout_gpus >= total:
            yield (
                f"trainer.rollout_gpus={trainer.rollout_gpus} of {total} GPUs (trainer.nnodes={trainer.nnodes} x "
                f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}) leaves none to train; lower it, or leave it null"
            )
    if trainer.async_steps and trainer.rollout_gpus is None:
        yield f"trainer.async_steps={trainer.async_steps} needs GPUs of its own; set trainer.rollout_gpus"
    if trainer.async_steps and config.algorithm.recompute_old_log_prob:
        yield (
            f"algorithm.recompute_old_log_prob=true with trainer.async_steps={trainer.async_steps}: samples come from "
            "older weights, and so must their old log-probabilities; set one of them off"
        )
    if "wandb" in trainer.logger:
        wandb_mode()
    for sink in ("wandb", "tensorboard"):
        if sink in trainer.logger and importlib.util.find_spec(sink) is None:
            yield (
                f"trainer.logger names {sink!r}, but the package {sink} is not installed: "
                f"pip install 'vexact[{sink}]', or leave {sink} out of trainer.logger"
            )
    if (trainer.resume_mode == "resume_path") != (trainer.resume_from_path is not None):
        yield (
            f"trainer.resume_mode={trainer.resume_mode} and trainer.resume_from_path={trainer.resume_from_path}: "
            "resume_path needs a path, and a path needs resume_mode=resume_path"
        )
    if trainer.resume_from_path is not None and not Path(os.path.expanduser(trainer.resume_from_path)).is_dir():
        yield f"trainer.resume_from_path={trainer.resume_from_path}: no such directory"
    given = trainer.default_local_dir or ""
    if given.startswith("~") and os.path.expanduser(given) == given:
        yield f"trainer.default_local_dir={given}: nobody's home directory; write ./{given} for one of that name here"
    blocking = next((path for path in (config.run_dir, *config.run_dir.parents) if path.exists()), None)
    if blocking is not None and not blocking.is_dir():
        yield f"the run directory {config.run_dir} cannot be made: {blocking} is a file; set trainer.default_local_dir"
    if (trainer.best_metric or "").startswith("val-") and not config.data.val_files:
        yield f"trainer.best_metric={trainer.best_metric} needs a validation; set data.val_files"
    if trainer.val_only and not config.data.val_files:
        yield "trainer.val_only=true needs data.val_files"


def _nearest_divisor(batch: int, mini: int) -> int:
    divisors = [size for size in range(1, batch + 1) if batch % size == 0]
    return min(divisors, key=lambda size: abs(size - mini))
