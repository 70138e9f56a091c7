"""What the actor needs to know, in verl's names; independent of the configuration files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from vexact.algorithms import (
    FIXED_AGG_MODES,
    KL_ESTIMATORS,
    CorrectionConfig,
    PolicyLossConfig,
    check_agg_mode,
    policy_loss,
)
from vexact.config.sections.actor import ActorSettings, OffloadSettings, OptimSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LR_SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class OptimConfig(OptimSettings):
    """AdamW and its schedule (verl's ``actor.optim``). The schedule advances once per ``update`` call, as in verl."""

    total_training_steps: int = -1

    def __post_init__(self) -> None:
        """Raises ValueError naming the key whose value makes no sense."""
        if self.lr_scheduler_type not in LR_SCHEDULES:
            known = ", ".join(LR_SCHEDULES)
            raise ValueError(f"unknown actor.optim.lr_scheduler_type {self.lr_scheduler_type!r}; choose one of {known}")
        if not self.lr >= 0:
            raise ValueError(f"actor.optim.lr must not be negative, got {self.lr}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"actor.optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        by_ratio = self.lr_warmup_steps < 0 and self.lr_warmup_steps_ratio > 0
        if (by_ratio or self.lr_scheduler_type != "constant") and self.total_training_steps < 1:
            raise ValueError(
                f"actor.optim.total_training_steps is {self.total_training_steps}, but the "
                f"{self.lr_scheduler_type!r} schedule with lr_warmup_steps_ratio={self.lr_warmup_steps_ratio} needs it"
            )

    @property
    def num_warmup_steps(self) -> int:
        if self.lr_warmup_steps >= 0:
            return self.lr_warmup_steps
        return int(self.lr_warmup_steps_ratio * self.total_training_steps) if self.lr_warmup_steps_ratio > 0 else 0

    def lr_at(self, step: int) -> float:
        """Learning rate of update number ``step`` (from 0).

        Constant: a linear warm-up from 0. Cosine and linear: a linear warm-up from ``min_lr_ratio``, then a decay to it
        at ``total_training_steps``. verl's formulas (``linear`` is ours).
        """
        warmup, floor = self.num_warmup_steps, self.min_lr_ratio
        if step < warmup:
            start = 0.0 if self.lr_scheduler_type == "constant" else floor
            return self.lr * (start + (1 - start) * step / warmup)
        if self.lr_scheduler_type == "constant":
            return self.lr
        progress = min(1.0, (step - warmup) / max(1, self.total_training_steps - warmup))
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if self.lr_scheduler_type == "cosine" else 1 - progress
        return self.lr * (floor + (1 - floor) * decay)


@dataclass(frozen=True)
class ActorConfig(OffloadSettings, ActorSettings):
    """verl's ``actor_rollout_ref.actor`` keys. Sizes are global: over all ranks."""

    ppo_mini_batch_size: int = 256  # in *sequences* (verl's key times rollout.n)
    data_loader_seed: int = 42
    balance_micro_batches: bool = True
    loss_mode: str = "vanilla"
    clip: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    loss_scale_factor: int | None = None
    enable_gradient_checkpointing: bool = False
    recompute_num_layers: int | None = None  # of a model's first layers; None: all
    dtype: str = "float32"  # of the forward, the backward and the weights that the rollout receives
    expert_parallel_size: int = 1  # groups of ranks that share the experts
    fsdp: bool | None = None  # None: shard when there are several ranks or the model's dtype is not ``dtype``
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        """Raises ValueError naming the key whose value makes no sense."""
        policy_loss(self.loss_mode)
        check_agg_mode(self.agg_mode, self.loss_scale_factor)
        if self.kl_loss_type.removesuffix("+") not in KL_ESTIMATORS:
            known = ", ".join(KL_ESTIMATORS)
            raise ValueError(f"unknown actor.kl_loss_type {self.kl_loss_type!r}; choose one of {known}, or add '+'")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown actor.dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if not self.grad_clip > 0:
            raise ValueError(f"actor.grad_clip must be positive (use inf for no clipping), got {self.grad_clip}")
        positive = "ppo_mini_batch_size", "ppo_max_token_len_per_gpu", "ulysses_sequence_parallel_size", "ppo_epochs"
        for key in (*positive, "expert_parallel_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"actor.{key} must be at least 1, got {getattr(self, key)}")

    @property
    def agg_mode(self) -> str:
        """The aggregation in force: sequence-level losses fix their own, whatever ``loss_agg_mode`` says."""
        return FIXED_AGG_MODES.get(self.loss_mode, self.loss_agg_mode)

    @property
    def max_micro_batch_tokens(self) -> int:
        """The budget of a micro-batch: that of one GPU times the ranks that share it, as in verl."""
        return self.ppo_max_token_len_per_gpu * self.ulysses_sequence_parallel_size

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
