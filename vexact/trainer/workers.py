"""Everything a run needs, built from its configuration."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vexact.algorithms import PolicyLossConfig
from vexact.config import Config
from vexact.data import ColumnNames, DataOrder, PromptDataset, PromptFormat
from vexact.data.chat_template import KEY as CHAT_TEMPLATE_KEY
from vexact.data.chat_template import ChatTemplate, read_template
from vexact.models import ModelConfig, load_model
from vexact.models.tokenizer import read_tokenizer
from vexact.reward.pool import RewardPool
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.spec import RewardSpec
from vexact.rollout import Engine
from vexact.training import Actor, ActorConfig, OptimConfig, Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before its model: cheap, and where most mistakes are."""

    tokenizer: Any
    train_data: PromptDataset
    val_data: PromptDataset | None


@dataclass(frozen=True, slots=True)
class Workers:
    """One process holds both engines: the rollout's weights are its own copy, in the compute dtype."""

    tokenizer: Any
    train_data: PromptDataset
    val_data: PromptDataset | None
    order: DataOrder
    engine: Engine
    actor: Actor
    reference: Reference | None
    rewards: RewardPool

    def close(self) -> None:
        """Ends the reward processes."""
        self.rewards.close()


def load_inputs(config: Config) -> Inputs:
    """Tokenizer, training rows and validation rows.

    Raises:
        ValueError, FileNotFoundError: what the user has to fix, named.
    """
    ModelConfig.from_hf_dir(config.model.path)  # the tokenizer reads it too, but cannot say what is wrong in it
    tokenizer, data = load_tokenizer(config), config.data
    train_data = _load_named("data.train_files", config, tokenizer, data.train_files, data.train_max_samples)
    val_data = None
    if data.val_files:
        val_data = _load_named("data.val_files", config, tokenizer, data.val_files, data.val_max_samples)
    return Inputs(tokenizer, train_data, val_data)


def build_workers(config: Config, device: torch.device, inputs: Inputs) -> Workers:
    """Reads the model and starts the reward processes.

    Raises:
        ValueError, FileNotFoundError: what the user has to fix, named.
    """
    num_rows = len(inputs.train_data)
    return Workers(
        tokenizer=inputs.tokenizer,
        train_data=inputs.train_data,
        val_data=inputs.val_data,
        order=DataOrder(num_rows, config.data_seed, config.data.shuffle),
        engine=_engine(config, inputs.tokenizer, device),
        actor=_actor(config, device, num_steps(config, num_rows)),
        reference=_reference(config, device) if config.needs_reference else None,
        rewards=start_rewards(config),
    )


def num_steps(config: Config, num_rows: int) -> int:
    """Training steps of the whole run: ``total_training_steps``, else as many as ``total_epochs`` hold."""
    if config.trainer.total_training_steps is not None:
        return config.trainer.total_training_steps
    return max(1, config.trainer.total_epochs * num_rows // config.data.train_batch_size)


def load_tokenizer(config: Config) -> Any:
    """The checkpoint's tokenizer, with ``custom_chat_template`` (Jinja, or a file of it) put in and looked at.

    Raises:
        ValueError: the directory holds none or a broken one, or the chat template is broken or leaves out what a user
            says.
    """
    path = config.model.tokenizer_path or config.model.path
    origin = f"the chat template of the tokenizer in {path}"
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; actor_rollout_ref.model.tokenizer_path names another directory") from error
    if config.model.custom_chat_template is not None:
        origin = CHAT_TEMPLATE_KEY
        tokenizer.chat_template = read_template(config.model.custom_chat_template)
    if tokenizer.chat_template:
        ChatTemplate(tokenizer, config.data.apply_chat_template_kwargs, origin).check()
    return tokenizer


def load_dataset(config: Config, tokenizer: Any, files: tuple[str, ...], max_samples: int) -> PromptDataset:
    """The first ``max_samples`` prompts (-1: all) of ``files``, as ``data.*`` says. Raises ValueError for bad rows."""
    data = config.data
    columns = ColumnNames(prompt=data.prompt_key, answer=data.answer_key, data_source=data.reward_fn_key)
    form = PromptFormat(
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong_prompts=data.filter_overlong_prompts,
        apply_chat_template_kwargs=data.apply_chat_template_kwargs,
    )
    return PromptDataset.from_files(
        files,
        tokenizer,
        columns=columns,
        form=form,
        max_samples=max_samples,
        custom_reward=config.reward.custom_reward_function.path is not None,
    )


def _load_named(key: str, config: Config, tokenizer: Any, files: tuple[str, ...], max_samples: int) -> PromptDataset:
    try:
        return load_dataset(config, tokenizer, files, max_samples)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _engine(config: Config, tokenizer: Any, device: torch.device) -> Engine:
    rollout = config.rollout
    engine = Engine(
        config.model.path,
        tokenizer=tokenizer,
        dtype=config.dtype(device.type),
        device=device,
        **engine_settings(config),
    )
    if not (rollout.ignore_eos or engine.eos_token_ids or rollout.stop or rollout.stop_token_ids):
        log.warning(
            "neither the model nor its tokenizer names an end-of-sequence token: every response runs to "
            "data.max_response_length; actor_rollout_ref.rollout.stop or .stop_token_ids ends them"
        )
    return engine


def engine_settings(config: Config) -> dict[str, Any]:
    """The fields of ``EngineConfig``."""
    rollout = config.rollout
    return {
        "page_size": rollout.page_size,
        "num_pages": rollout.num_pages,
        "kv_cache_bytes": rollout.kv_cache_bytes,
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": rollout.max_num_batched_tokens,
        "max_model_len": config.max_model_len,
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "enforce_eager": rollout.enforce_eager,
        "cudagraph_capture_sizes": rollout.cudagraph_capture_sizes,
        "seed": config.rollout_seed,
        "batch_invariant": rollout.batch_invariant,
        "attn_impl": rollout.attn_impl,
        "mismatch_mode": rollout.mismatch.mode,
        "mismatch_scale": rollout.mismatch.scale,
    }


def actor_config(config: Config, device: torch.device, total_steps: int) -> ActorConfig:
    actor, optim = config.actor, config.actor.optim
    return ActorConfig(
        ppo_mini_batch_size=config.mini_batch_prompts * config.rollout.n,
        ppo_max_token_len_per_gpu=actor.ppo_max_token_len_per_gpu,
        ppo_epochs=actor.ppo_epochs,
        shuffle=actor.shuffle,
        data_loader_seed=config.data_seed,
        loss_mode=actor.policy_loss.loss_mode,
        clip=PolicyLossConfig(
            clip_ratio_low=actor.clip_low, clip_ratio_high=actor.clip_high, clip_ratio_c=actor.clip_ratio_c
        ),
        loss_agg_mode=actor.loss_agg_mode,
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        entropy_coeff=actor.entropy_coeff,
        use_kl_loss=actor.use_kl_loss,
        kl_loss_coef=actor.kl_loss_coef,
        kl_loss_type=actor.kl_loss_type,
        grad_clip=actor.grad_clip,
        enable_gradient_checkpointing=config.model.enable_gradient_checkpointing,
        dtype=config.dtype(device.type),
        param_offload=actor.fsdp_config.param_offload,
        optimizer_offload=actor.fsdp_config.optimizer_offload,
        optim=OptimConfig(
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            lr_warmup_steps=optim.lr_warmup_steps,
            lr_warmup_steps_ratio=optim.lr_warmup_steps_ratio,
            lr_scheduler_type=optim.lr_scheduler_type,
            min_lr_ratio=optim.min_lr_ratio,
            total_training_steps=total_steps,
        ),
    )


def _actor(config: Config, device: torch.device, total_steps: int) -> Actor:
    model = load_model(config.model.path, device=device, attn_impl=config.actor.attn_implementation)
    return Actor(model, actor_config(config, device, total_steps), device)


def _reference(config: Config, device: torch.device) -> Reference:
    budget = config.ref.log_prob_max_token_len_per_gpu or config.actor.ppo_max_token_len_per_gpu
    dtype = config.dtype(device.type)
    model = load_model(
        config.model.path, dtype=getattr(torch, dtype), device=device, attn_impl=config.actor.attn_implementation
    )
    offload = config.ref.fsdp_config.param_offload
    return Reference(model, ActorConfig(ppo_max_token_len_per_gpu=budget, dtype=dtype, param_offload=offload), device)


def start_rewards(config: Config) -> RewardPool:
    """The grader processes. Raises RewardError when the user's function cannot be loaded."""
    custom = config.reward.custom_reward_function
    policy = SandboxPolicy(**asdict(config.reward.sandbox))
    spec = RewardSpec(custom.path, custom.name, custom.reward_kwargs, policy)
    return RewardPool(config.reward.num_workers, spec, config.reward.timeout_s)
