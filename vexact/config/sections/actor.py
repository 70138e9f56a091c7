"""`actor_rollout_ref.actor.*`: the policy update."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vexact.attention import ATTENTION, TRITON_INVARIANT
from vexact.config.fields import opt, section

DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "half": "float16", "float": "float32"}
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "low_var_kl+", "k3+"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DTYPE_HELP = "auto is that of the other side; of both, bfloat16 on a GPU and float32 on the CPU."


@dataclass(frozen=True)
class OptimSettings:
    """A key written here is also one of ``vexact.training.OptimConfig``."""

    lr: float = opt(1e-6, "Peak learning rate of AdamW.", ge=0)
    weight_decay: float = opt(0.01, "Decoupled weight decay.", ge=0)
    betas: tuple[float, ...] = opt((0.9, 0.999), "Decay rates of AdamW's two moments.", ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW's denominator term.", ge=1e-37, why="a smaller one is 0 in float32")
    lr_warmup_steps: int = opt(
        -1,
        "Linear warm-up in training steps, that is rollouts: all optimizer steps of a rollout have one rate, which "
        "moves once per rollout, as in verl. -1 uses lr_warmup_steps_ratio.",
        ge=-1,
    )
    lr_warmup_steps_ratio: float = opt(0.0, "Warm-up as a share of all training steps.", ge=0, le=1)
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = opt("constant", "Shape after the warm-up.")
    min_lr_ratio: float = opt(0.0, "Where cosine and linear end, as a share of lr.", ge=0, le=1)


@dataclass(frozen=True)
class PolicyLossConfig:
    loss_mode: Literal["vanilla", "gspo", "reinforce"] = opt(
        "vanilla",
        "vanilla is PPO's clipped loss, with clip-higher and dual clip.",
        refused=dict.fromkeys(
            ("sapo", "clip_cov", "kl_cov", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "dro", "bypass_mode"),
            "this loss is not built in; use vanilla, gspo or reinforce",
        ),
        aliases={"ppo": "vanilla", "gpg": "reinforce"},
    )


@dataclass(frozen=True)
class OffloadSettings:
    """A key written here is also one of ``vexact.training.ActorConfig``."""

    param_offload: bool = opt(False, "Keep the master weights in pinned host memory while nothing is trained.")
    optimizer_offload: bool = opt(
        False, "Keep AdamW's moments in pinned host memory; a step streams them through the GPU. No bit changes."
    )

    def offload_settings(self) -> dict[str, Any]:
        """These keys and their values."""
        return {item.name: getattr(self, item.name) for item in fields(OffloadSettings)}


@dataclass(frozen=True)
class FSDPConfig(OffloadSettings):
    dtype: Dtype = opt(
        "auto",
        f"Compute type of the training forward; must equal the rollout's. {DTYPE_HELP}",
        verl="bfloat16",
        aliases=DTYPE_ALIASES,
    )
    model_dtype: Literal["float32"] = opt(
        "float32", "Type of the master weights and optimizer state.", aliases=DTYPE_ALIASES
    )
    expert_parallel_size: int = opt(
        1,
        "Groups of training GPUs that share the experts of a mixture: each computes with the experts that its GPUs "
        "keep, for tokens of all, instead of gathering every expert. Must divide the training GPUs and the experts; "
        "with as many groups as GPUs no expert is gathered. No bit changes. The reference policy is shared alike.",
        ge=1,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    async_save: bool = opt(
        False,
        "Write checkpoints while training goes on, from a copy of the state in host memory (12 bytes per parameter, "
        "split over the ranks).",
    )


@dataclass(frozen=True)
class ActorSettings:
    """A key written here is also one of ``vexact.training.ActorConfig`` and reaches every actor."""

    ppo_max_token_len_per_gpu: int = opt(
        16384,
        "Tokens per packed forward. Lower it when memory runs out: log-probabilities keep their bits, while gradients "
        "are summed in another order and may differ in their last bits, so the weights after an update may as well.",
        ge=1,
    )
    ulysses_sequence_parallel_size: int = opt(
        1,
        "GPUs that share each packed forward, of so many times ppo_max_token_len_per_gpu tokens: for long responses. "
        "Must divide the training GPUs and the model's attention heads. Log-probabilities keep their bits; weights "
        "after an update are those of this size. The reference policy is shared alike.",
        ge=1,
    )
    ppo_epochs: int = opt(
        1, "Passes over each rollout batch; only the first update of the first pass is on-policy.", ge=1
    )
    shuffle: bool = opt(False, "Shuffle sequences between mini-batches.")
    loss_agg_mode: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = opt("token-mean", "How token losses become one number; denominators are global, whatever the micro-batch.")
    entropy_coeff: float = opt(0.0, "Weight of the entropy bonus.", ge=0)
    use_kl_loss: bool = opt(False, "Add a KL term towards the initial policy to the loss.")
    kl_loss_coef: float = opt(0.001, "Weight of that term.", ge=0)
    kl_loss_type: KLKind = opt(
        "low_var_kl",
        "KL estimator; a trailing + takes the gradient of k2.",
        refused={"full": "the full-vocabulary KL is not built in; use low_var_kl"},
    )
    router_aux_loss_coef: float | None = opt(
        0.0,
        "Weight of a loss that evens out the load of experts: DeepSeek-V3's, of every sequence on its own, summed over "
        "layers and averaged over the sequences of a mini-batch. 0 leaves it out, as reinforcement learning usually "
        "does; null takes config.json's router_aux_loss_coef (with output_router_logits) or aux_loss_alpha.",
        ge=0,
    )
    router_bias_update_rate: float = opt(
        0.0,
        "How far every optimizer step moves the bias that DeepSeek-V3's router adds to an expert's score, up where it "
        "had fewer tokens of the mini-batch than the mean and down where it had more; 0 keeps the bias.",
        ge=0,
    )
    grad_clip: float = opt(1.0, "Largest gradient norm; inf never clips.", gt=0, infinite=True)

    def actor_settings(self) -> dict[str, Any]:
        """These keys and their values."""
        return {item.name: getattr(self, item.name) for item in fields(ActorSettings)}


@dataclass(frozen=True)
class ActorSection(ActorSettings):
    strategy: Literal["fsdp2", "fsdp"] = opt(
        "fsdp2",
        "Sharding of the trainer; both spellings mean PyTorch's fully_shard.",
        verl="fsdp",
        refused={"megatron": "only FSDP2 is built in", "veomni": "only FSDP2 is built in"},
    )
    attn_implementation: str = opt(
        TRITON_INVARIANT,
        f"Attention of the training forward, one of: {', '.join(ATTENTION)}. VEOMNI_ATTN_IMPLEMENTATION sets it.",
        verl="flash_attention_2",
    )
    ppo_mini_batch_size: int | None = opt(
        None,
        "Prompts per optimizer step (times rollout.n sequences); null takes the whole batch: one step, exactly "
        "on-policy.",
        verl=256,
        ge=1,
    )
    clip_ratio: float = opt(0.2, "PPO clip range; as lower range it must be below 1.", gt=0)
    clip_ratio_low: float | None = opt(None, "Lower clip range; null takes clip_ratio.", verl=0.2, gt=0, lt=1)
    clip_ratio_high: float | None = opt(None, "Upper clip range (clip-higher); null takes clip_ratio.", verl=0.2, gt=0)
    clip_ratio_c: float = opt(3.0, "Dual-clip bound for negative advantages.", gt=1)
    loss_scale_factor: int | None = opt(
        None, "Divisor of seq-mean-token-sum-norm; null takes data.max_response_length.", ge=1
    )
    policy_loss: PolicyLossConfig = section(PolicyLossConfig, "Which loss.")
    optim: OptimSettings = section(OptimSettings, "Optimizer and schedule.")
    fsdp_config: FSDPConfig = section(FSDPConfig, "Types and sharding.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "How the state is saved.")

    @property
    def clip_low(self) -> float:
        return self.clip_ratio if self.clip_ratio_low is None else self.clip_ratio_low

    @property
    def clip_high(self) -> float:
        return self.clip_ratio if self.clip_ratio_high is None else self.clip_ratio_high
