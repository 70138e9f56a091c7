"""Who generates in throughput.py: our engine in its modes, transformers, vLLM; each from the same checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vexact.device import resolve_device

Batch = list[tuple[list[int], list[float]]]


@dataclass(frozen=True, slots=True)
class Side:
    """``generate(prompts, new tokens)`` gives tokens and their log-probabilities, of which there may be none."""

    generate: Callable[[Sequence[Sequence[int]], int], Batch]
    attention: str
    version: str


def ours(model: Path, limits: dict[str, Any], dtype: str, **settings: Any) -> Side:
    import vexact
    from vexact.rollout import Engine, SamplingParams

    engine = Engine(model, dtype=dtype, device=resolve_device("auto"), **limits, **settings)

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Batch:
        samples = engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
        return [(list(sample.token_ids), sample.logprobs.tolist()) for sample in samples]

    return Side(generate, engine.attention, f"vexact {vexact.__version__}")


def transformers_side(model: Path, limits: dict[str, Any], dtype: str) -> Side:
    """``generate`` as people call it: a padded batch, torch's SDPA, no graphs, no log-probabilities."""
    import transformers

    device = resolve_device("auto")
    decoder = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
    ).to(device)

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Batch:
        given = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            found = decoder.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return [(row, []) for row in found[:, given.shape[1] :].tolist()]

    return Side(generate, "sdpa", f"transformers {transformers.__version__}")


def vllm(model: Path, limits: dict[str, Any], dtype: str) -> Side:
    from vllm import LLM, SamplingParams

    on_gpu = torch.cuda.is_available()
    llm = LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=not on_gpu,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        **{key: value for key, value in limits.items() if key != "kv_cache_bytes"},
        kv_cache_memory_bytes=limits["kv_cache_bytes"],
    )

    def generate(prompts: Sequence[Sequence[int]], new: int) -> Batch:
        params = SamplingParams(max_tokens=new, temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return [
            (list(one.token_ids), [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)])
            for one in (output.outputs[0] for output in outputs)
        ]

    return Side(generate, "its own", f"vllm {sys.modules['vllm'].__version__}")


SIDES: dict[str, Callable[[Path, dict[str, Any], str], Side]] = {
    "exact": ours,
    "exact-eager": partial(ours, enforce_eager=True),
    "stock": partial(ours, batch_invariant=False),
    "hf": transformers_side,
    "vllm": vllm,
    "vllm-invariant": vllm,  # with VLLM_BATCH_INVARIANT=1
}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
QUIET |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}  # this process has touched the GPU already
QUIET |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # it would pin all of its threads to cores that others use
ENVIRONMENT = {"vllm": QUIET, "vllm-invariant": QUIET | {"VLLM_BATCH_INVARIANT": "1"}}
"""Variables of a side's process, where they are not set."""
