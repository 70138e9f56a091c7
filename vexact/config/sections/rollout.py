"""`actor_rollout_ref.rollout.*`: the sampling engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.fields import LARGEST_64, opt, section
from vexact.config.sections.actor import DTYPE_ALIASES, DTYPE_HELP, Dtype
from vexact.config.sections.engine import EngineSettings

OWN = "vexact"
MIN_TEMPERATURE, MAX_TEMPERATURE, MAX_SAMPLES = 1e-3, 1e6, 2**16  # the sampler's


@dataclass(frozen=True)
class ValidationSampling:
    n: int = opt(1, "Samples per validation prompt (mean@n).", ge=1, le=MAX_SAMPLES)
    do_sample: bool = opt(False, "False decodes greedily, whatever the temperature.")
    temperature: float = opt(
        0.0,
        f"Temperature of validation samples: 0 is greedy, else at least {MIN_TEMPERATURE:g}.",
        ge=0,
        le=MAX_TEMPERATURE,
    )
    top_p: float = opt(1.0, "Nucleus mass.", gt=0, le=1)
    top_k: int = opt(-1, "Keep the k largest logits; -1 keeps all.", ge=-1)
    min_p: float = opt(0.0, "Keep tokens of at least this share of the largest probability.", ge=0, le=1)


@dataclass(frozen=True)
class Mismatch:
    mode: Literal["none", "k_order", "softmax_blocks", "bf16_logits", "noise"] = opt(
        "none",
        "Makes the rollout compute something else than the trainer, for experiments: k_order sums matrix products in "
        "another order, softmax_blocks runs torch's SDPA, bf16_logits rounds the logits, noise adds Gaussian noise to "
        "them.",
    )
    scale: float = opt(
        1.0,
        "How much of it; 0 is nothing. k_order, softmax_blocks: share of the layers, from the first on; bf16_logits: "
        "how far a logit moves towards its rounded value; noise: standard deviation in logits.",
        ge=0,
    )


@dataclass(frozen=True)
class RolloutSection(EngineSettings):
    name: str = opt(
        OWN,
        "The rollout engine: vexact, or one that an installed bridge provides (vllm) as a baseline that is not exact.",
        verl="required",
        refused=dict.fromkeys(
            ("sglang", "trtllm", "hf"),
            "there is no bridge to it, and it would not give the trainer's bits; for a deliberate baseline set "
            "actor_rollout_ref.rollout.batch_invariant=false, or name=vllm with its bridge",
        ),
    )
    dtype: Dtype = opt(
        "auto",
        f"Compute type of the rollout; must equal the trainer's. {DTYPE_HELP}",
        verl="bfloat16",
        aliases=DTYPE_ALIASES,
    )
    n: int = opt(8, "Samples per prompt.", verl=1, ge=1, le=MAX_SAMPLES)
    temperature: float = opt(
        1.0,
        "Sampling temperature of training rollouts.",
        ge=MIN_TEMPERATURE,
        le=MAX_TEMPERATURE,
        why="0 is greedy: every sample of a group would be equal; near it float32 no longer tells tokens apart",
    )
    top_p: float = opt(
        1.0,
        "Nucleus mass; the trainer renormalises over the same kept tokens (under later weights: docs/numerics.md).",
        gt=0,
        le=1,
    )
    top_k: int = opt(-1, "Keep the k largest logits; -1 keeps all.", ge=-1)
    min_p: float = opt(0.0, "Keep tokens of at least this share of the largest probability.", ge=0, le=1)
    ignore_eos: bool = opt(False, "Sample on past the end-of-sequence tokens.")
    stop: tuple[str, ...] = opt(
        (), "Strings that end a response and are cut from its text; special tokens too; none may be empty."
    )
    stop_token_ids: tuple[int, ...] = opt(
        (),
        "Token ids that end a response, besides the end-of-sequence tokens of generation_config.json, config.json and "
        "the tokenizer.",
        ge=0,
    )
    seed: int | None = opt(None, "Seed of the sampler; null takes trainer.seed.", verl=42, ge=0, le=LARGEST_64)
    mismatch: Mismatch = section(Mismatch, "Controlled disagreement with the trainer.")
    val_kwargs: ValidationSampling = section(ValidationSampling, "Sampling during validation.")

    @property
    def is_own(self) -> bool:
        """Whether this package's engine generates: no other gives the trainer's bits."""
        return self.name == OWN
