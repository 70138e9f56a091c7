"""The settings of engines and actors, from the configuration."""

from __future__ import annotations

from typing import Any

import torch

from vexact.algorithms import CorrectionConfig, PolicyLossConfig, Rejection
from vexact.config import Config
from vexact.training import ActorConfig, OptimConfig


def engine_settings(config: Config) -> dict[str, Any]:
    """The fields of ``EngineConfig``."""
    rollout = config.rollout
    return rollout.engine_settings() | {
        "max_model_len": config.max_model_len,
        "seed": config.rollout_seed,
        "mismatch_mode": rollout.mismatch.mode,
        "mismatch_scale": rollout.mismatch.scale,
    }


def actor_config(config: Config, device: torch.device, total_steps: int) -> ActorConfig:
    actor, recomputed = config.actor, config.model.recompute_num_layers
    return ActorConfig(
        **actor.actor_settings(),
        **actor.fsdp_config.offload_settings(),
        expert_parallel_size=actor.fsdp_config.expert_parallel_size,
        ppo_mini_batch_size=config.mini_batch_prompts * config.rollout.n,
        data_loader_seed=config.data_seed,
        loss_mode=config.loss_mode,
        clip=PolicyLossConfig(
            clip_ratio_low=actor.clip_low, clip_ratio_high=actor.clip_high, clip_ratio_c=actor.clip_ratio_c
        ),
        correction=correction_config(config),
        loss_scale_factor=actor.loss_scale_factor or config.data.max_response_length,
        enable_gradient_checkpointing=config.model.enable_gradient_checkpointing,
        recompute_num_layers=None if recomputed == "auto" else recomputed,
        dtype=config.dtype(device.type),
        optim=OptimConfig(**vars(actor.optim), total_training_steps=total_steps),
    )


def correction_config(config: Config) -> CorrectionConfig:
    """What ``algorithm.rollout_correction`` asks for; the weights apply unless the loss holds their ratio already."""
    given, bypass = config.algorithm.rollout_correction, config.algorithm.bypasses
    lower, upper = given.weight_bounds()
    return CorrectionConfig(
        level=given.rollout_is,
        upper=upper,
        lower=lower,
        batch_normalize=given.rollout_is_batch_normalize,
        rejections=tuple(Rejection(name, most, least) for name, least, most in given.rejections()),
        veto=given.rollout_token_veto_threshold,
        bypass=bypass,
        weights_apply=not bypass or config.loss_mode == "reinforce",
    )
