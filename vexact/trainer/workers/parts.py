"""The engine, the actor and the reference of one process."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from vexact.config import Config
from vexact.plugins import load_rollout
from vexact.rollout import Engine
from vexact.rollout.protocol import ForeignRollout, RolloutPlugin
from vexact.trainer.workers.settings import actor_config, engine_settings
from vexact.training import Actor, ActorConfig, Ranks, Reference, load_sharded_model

log = logging.getLogger(__name__)


def build_engine(config: Config, tokenizer: Any, device: torch.device) -> Engine | ForeignRollout:
    """Raises ValueError, FileNotFoundError: what the user has to fix, named."""
    rollout = config.rollout
    if not rollout.is_own:
        plugin: RolloutPlugin = load_rollout(rollout.name)
        return plugin.build(config, tokenizer, device)
    engine = Engine(
        config.model.path,
        tokenizer=tokenizer,
        dtype=config.dtype(device.type),
        device=device,
        read_weights=not rollout.enable_sleep_mode,  # of one that sleeps the first sync brings them
        **engine_settings(config),
    )
    if not (rollout.ignore_eos or engine.eos_token_ids or rollout.stop or rollout.stop_token_ids):
        log.warning(
            "neither the model nor its tokenizer names an end-of-sequence token: every response runs to "
            "data.max_response_length; actor_rollout_ref.rollout.stop or .stop_token_ids ends them"
        )
    return engine


def build_actor(
    config: Config, device: torch.device, total_steps: int, group: dist.ProcessGroup | None = None
) -> Actor:
    """``group``: the ranks that train, None for all of them. Raises as ``build_engine``."""
    settings = actor_config(config, device, total_steps)
    model = load_sharded_model(
        config.model.path,
        Ranks.of_process(device, group),
        settings.torch_dtype,
        attn_impl=config.actor.attn_implementation,
        expert_parallel_size=config.actor.fsdp_config.expert_parallel_size,
    )
    return Actor(model, settings, device, group)


def build_reference(config: Config, device: torch.device, group: dist.ProcessGroup | None = None) -> Reference:
    """``group``: the ranks that train, None for all of them. Raises as ``build_engine``."""
    budget = config.ref.log_prob_max_token_len_per_gpu or config.actor.ppo_max_token_len_per_gpu
    dtype = config.dtype(device.type)
    model = load_sharded_model(
        config.model.path,
        Ranks.of_process(device, group),
        getattr(torch, dtype),
        master_dtype=getattr(torch, dtype),
        attn_impl=config.actor.attn_implementation,
        expert_parallel_size=config.actor.fsdp_config.expert_parallel_size,
    )
    offload = config.ref.fsdp_config.param_offload
    settings = ActorConfig(
        ppo_max_token_len_per_gpu=budget,
        ulysses_sequence_parallel_size=config.actor.ulysses_sequence_parallel_size,
        expert_parallel_size=config.actor.fsdp_config.expert_parallel_size,
        dtype=dtype,
        param_offload=offload,
    )
    return Reference(model, settings, device, group)
