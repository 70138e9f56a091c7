"""The keys of `actor_rollout_ref.rollout.*` that the engine itself reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from vexact.attention import ATTENTION, TRITON_INVARIANT
from vexact.config.fields import LARGEST_64, opt


@dataclass(frozen=True)
class EngineSettings:
    """A key written here is also one of ``vexact.rollout.EngineConfig`` and reaches every engine.

    None of them may change a sampled token or a bit of a log-probability, except the deliberate baseline
    ``batch_invariant=False``.
    """

    batch_invariant: bool = opt(
        True,
        "False samples with stock operators: a baseline that shows the mismatch this project removes, and its cost. "
        "Unless attn_impl names another, attention is then paged FlashAttention-2 where the package flash_attn or "
        "torch 2.13 is installed (page_size becomes a multiple of 256), else triton-invariant; the plan says which.",
    )
    attn_impl: str = opt(
        TRITON_INVARIANT, f"Attention of the rollout, one of: {', '.join(ATTENTION)}. INFER_FA_IMPL sets it."
    )
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
    enable_sleep_mode: bool = opt(
        False,
        "Give the memory of the rollout's weights as well; the weight sync then brings every one of them anew. For "
        "models whose update does not fit beside a whole copy of the weights. Never changes results.",
        verl=True,
    )
    max_num_seqs: int = opt(256, "Most requests decoded at once.", ge=1)
    max_num_batched_tokens: int = opt(8192, "Most tokens per engine step.", ge=1)
    max_model_len: int | None = opt(
        None, "Longest prompt plus response; null takes data.max_prompt_length + max_response_length.", ge=2
    )
    enable_chunked_prefill: bool = opt(True, "Mix pieces of long prompts with decoding. Never changes results.")
    enable_prefix_caching: bool = opt(True, "Share the pages of equal prefixes. Never changes results.")
    async_scheduling: bool | Literal["auto"] = opt(
        "auto",
        "Launch a step before the host has seen the tokens of the step before, so that the GPU does not wait for the "
        "host. Never changes results. auto: on a GPU.",
    )
    enforce_eager: bool = opt(
        False,
        "Decode without CUDA graphs: slower, less memory. Never changes results. There are none on the CPU, nor with "
        "attention that gathers keys (mismatch.mode=softmax_blocks, a stock attn_impl).",
    )
    cudagraph_capture_sizes: tuple[int, ...] | None = opt(
        None,
        "Batch sizes of decode steps that get a CUDA graph, each captured on first use; a step runs in the next larger "
        "one. A size above max_num_seqs counts as that. null is a ladder from 1 to max_num_seqs.",
        ge=1,
    )

    def engine_settings(self) -> dict[str, Any]:
        """These keys and their values."""
        return {item.name: getattr(self, item.name) for item in fields(EngineSettings)}
