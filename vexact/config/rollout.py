"""`actor_rollout_ref.rollout.*`: the sampling engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.actor import DTYPE_ALIASES, DTYPE_HELP, Dtype
from vexact.config.fields import LARGEST_64, opt, section
from vexact.env import ATTENTION, TRITON_INVARIANT

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
class RolloutSection:
    name: Literal["vexact"] = opt(
        "vexact",
        "The rollout engine.",
        verl="required",
        refused=dict.fromkeys(
            ("vllm", "sglang", "trtllm", "hf"),
            "this version samples with its own engine only, because others do not give the trainer's bits; "
            "for a deliberate baseline set actor_rollout_ref.rollout.batch_invariant=false",
        ),
    )
    batch_invariant: bool = opt(
        True, "False samples with stock operators: a baseline that shows the mismatch this project removes."
    )
    attn_impl: str = opt(
        TRITON_INVARIANT, f"Attention of the rollout, one of: {', '.join(ATTENTION)}. INFER_FA_IMPL sets it."
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
    top_p: float = opt(1.0, "Nucleus mass; the trainer renormalises over the same kept tokens.", gt=0, le=1)
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
    page_size: int = opt(64, "Tokens per key-value page; multiples of 64 are fastest.", ge=1)
    num_pages: int | None = opt(None, "Pages in the key-value cache; null sizes it in bytes.", ge=1)
    kv_cache_bytes: int | None = opt(
        None,
        "Memory for the key-value cache in bytes; null is 256 MiB on the CPU, gpu_memory_utilization on a GPU.",
        ge=1,
        le=LARGEST_64,
    )
    gpu_memory_utilization: float = opt(
        0.5,
        "Share of the free GPU memory the key-value cache takes when neither num_pages nor kv_cache_bytes is set.",
        gt=0,
        le=1,
    )
    free_cache_engine: bool = opt(
        True, "Give the key-value cache's memory to the trainer while it trains on the same GPU. Never changes results."
    )
    max_num_seqs: int = opt(256, "Most requests decoded at once.", ge=1)
    max_num_batched_tokens: int = opt(8192, "Most tokens per engine step.", ge=1)
    max_model_len: int | None = opt(
        None, "Longest prompt plus response; null takes data.max_prompt_length + max_response_length.", ge=2
    )
    enable_chunked_prefill: bool = opt(True, "Mix pieces of long prompts with decoding. Never changes results.")
    enable_prefix_caching: bool = opt(True, "Share the pages of equal prefixes. Never changes results.")
    enforce_eager: bool = opt(
        False,
        "Decode without CUDA graphs: slower, less memory. Never changes results. There are none on the CPU, nor with "
        "torch's operators (batch_invariant=false, mismatch.mode=softmax_blocks, a stock attn_impl).",
    )
    cudagraph_capture_sizes: tuple[int, ...] | None = opt(
        None,
        "Batch sizes of decode steps that get a CUDA graph, each captured on first use; a step runs in the next larger "
        "one. A size above max_num_seqs counts as that. null is a ladder from 1 to max_num_seqs.",
        ge=1,
    )
    mismatch: Mismatch = section(Mismatch, "Controlled disagreement with the trainer.")
    val_kwargs: ValidationSampling = section(ValidationSampling, "Sampling during validation.")
