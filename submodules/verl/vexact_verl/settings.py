"""verl's configuration of a training engine as vexact's; what could not be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from verl.utils.device import get_device_name
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.torch_functional import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from vexact.training import ActorConfig, OptimConfig

_ATTENTION = "triton-invariant"


def actor_config(
    model: HFModelConfig, engine: FSDPEngineConfig, optim: FSDPOptimizerConfig | None, num_ranks: int
) -> ActorConfig:
    """Raises ValueError listing every setting that could not be honoured."""
    found = [*_of_model(model), *_of_engine(engine, num_ranks), *(_of_optimizer(optim) if optim is not None else ())]
    if found:
        raise ValueError("actor.strategy=vexact: " + "; ".join(found))
    dtype = str(_compute_dtype(engine)).removeprefix("torch.")
    on_gpu = get_device_name() != "cpu"  # elsewhere there is no other memory to move anything to
    return ActorConfig(
        dtype=dtype,
        grad_clip=optim.clip_grad if optim is not None else 1.0,
        enable_gradient_checkpointing=model.enable_gradient_checkpointing,
        param_offload=on_gpu and engine.param_offload,
        optimizer_offload=on_gpu and engine.optimizer_offload,
        optim=OptimConfig() if optim is None else _optim_config(optim),
    )


def learning_rate(config: FSDPOptimizerConfig) -> Callable[[int], float]:
    """verl's own schedule as a function of how often it was advanced."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    num_warmup = config.lr_warmup_steps if config.lr_warmup_steps is not None else -1
    if num_warmup <= 0:
        num_warmup = int(config.lr_warmup_steps_ratio * config.total_training_steps)
    if config.lr_scheduler_type == "cosine":
        schedule = get_cosine_schedule_with_warmup(
            optimizer=optimizer,
            num_warmup_steps=num_warmup,
            num_training_steps=config.total_training_steps,
            min_lr_ratio=config.min_lr_ratio or 0.0,
            num_cycles=config.num_cycles,
            zero_indexed_step=config.zero_indexed_step,
        )
    else:
        schedule = get_constant_schedule_with_warmup(optimizer=optimizer, num_warmup_steps=num_warmup)
    factor = schedule.lr_lambdas[0]
    return lambda step: config.lr * factor(step)


def _optim_config(config: FSDPOptimizerConfig) -> OptimConfig:
    eps = (config.override_optimizer_config or {}).get("eps", OptimConfig.eps)
    return OptimConfig(lr=config.lr, weight_decay=config.weight_decay, betas=tuple(config.betas), eps=eps)


def _compute_dtype(engine: FSDPEngineConfig) -> torch.dtype:
    return PrecisionType.to_dtype((engine.mixed_precision or {}).get("param_dtype", "bf16"))


def _of_model(model: HFModelConfig) -> Iterator[str]:
    if model.lora_rank > 0 or model.lora.get("rank", 0) > 0 or model.lora_adapter_path:
        yield "model.lora_rank: LoRA is not built in; train all weights"
    for key in ("use_liger", "enable_activation_offload"):
        if getattr(model, key):
            yield f"model.{key}=True: the model runs on vexact's operators only; leave it off"
    if model.tiled_mlp.get("enabled", False):
        yield "model.tiled_mlp.enabled=True: the model runs on vexact's operators only; leave it off"
    if model.hf_config_path != model.path:
        yield f"model.hf_config_path={model.hf_config_path}: the model is what config.json in model.path says"
    if model.mtp.enable:
        yield "model.mtp.enable=True: multi-token prediction is not built in"
    changed = {key: value for key, value in model.override_config.items() if key != "attn_implementation"}
    if changed.pop("model_config", None) or changed:
        yield "model.override_config: the model is what its config.json says; change it there"
    attention = model.override_config.get("attn_implementation", _ATTENTION)
    if attention != _ATTENTION:
        yield f"model.override_config.attn_implementation={attention}: the rollout has {_ATTENTION}; leave it out"


def _of_engine(engine: FSDPEngineConfig, num_ranks: int) -> Iterator[str]:
    if engine.ulysses_sequence_parallel_size > 1:
        yield f"ulysses_sequence_parallel_size={engine.ulysses_sequence_parallel_size}: not built in here; use 1"
    if engine.fsdp_size not in (-1, num_ranks):
        yield f"fsdp_config.fsdp_size={engine.fsdp_size}: weights are sharded over all {num_ranks} ranks; use -1"
    if engine.offload_policy:
        yield "fsdp_config.offload_policy=True: use param_offload and optimizer_offload"
    if engine.pad_to_length:
        yield "fsdp_config.pad_to_length=True: packed batches are never padded; leave it off"
    if engine.qat.enable:
        yield "fsdp_config.qat.enable=True: quantised training is not built in"
    if engine.router_replay.mode != "disabled":
        yield f"router_replay.mode={engine.router_replay.mode}: there are no routers to replay"
    if not PrecisionType.is_fp32(engine.model_dtype or "fp32"):
        yield f"fsdp_config.model_dtype={engine.model_dtype}: master weights are fp32"
    precision: Mapping[str, Any] = engine.mixed_precision or {}
    if _compute_dtype(engine) == torch.float16:
        yield "fsdp_config.mixed_precision.param_dtype=fp16: there is no loss scaling; use bf16 or fp32"
    if not PrecisionType.is_fp32(precision.get("reduce_dtype", "fp32")):
        yield f"fsdp_config.mixed_precision.reduce_dtype={precision['reduce_dtype']}: gradients are summed in fp32"
    if not PrecisionType.is_fp32(precision.get("buffer_dtype", "fp32")):
        yield f"fsdp_config.mixed_precision.buffer_dtype={precision['buffer_dtype']}: the rotary table is fp32"


def _of_optimizer(optim: FSDPOptimizerConfig) -> Iterator[str]:
    if (optim.optimizer, optim.optimizer_impl) != ("AdamW", "torch.optim"):
        yield f"optim.optimizer={optim.optimizer_impl}.{optim.optimizer}: only AdamW is built in"
    others = sorted((optim.override_optimizer_config or {}).keys() - {"eps"})
    if others:
        yield f"optim.override_optimizer_config has {', '.join(others)}; only eps can be set"
