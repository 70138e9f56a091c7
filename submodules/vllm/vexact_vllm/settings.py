"""Which rollout settings vLLM honours, and how they are called there; all others are refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from vexact.config import Config

ROLLOUT = "actor_rollout_ref.rollout"
LEAST_TEMPERATURE = 0.01  # vLLM silently takes this for anything between it and 0
CPU_KV_CACHE_BYTES = 256 * 2**20  # as our own engine
_HONOURED = (
    *("name", "dtype", "n", "temperature", "ignore_eos", "stop", "stop_token_ids", "seed", "val_kwargs"),
    *("kv_cache_bytes", "gpu_memory_utilization", "free_cache_engine", "max_num_seqs", "max_num_batched_tokens"),
    *("max_model_len", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "cudagraph_capture_sizes"),
)
_KEPT = "vLLM does not say which logits it kept, so the trainer could not renormalise over the same tokens"
_OWN = "it is a setting of vexact's own engine; leave it at its default"
_WHY = {
    "top_p": f"{_KEPT}; set it to 1",
    "top_k": f"{_KEPT}; set it to -1",
    "min_p": f"{_KEPT}; set it to 0",
    "num_pages": "vLLM sizes its pages itself; set kv_cache_bytes",
    "batch_invariant": "vLLM is a baseline that is not exact already; leave it at its default",
}


def check(config: Config) -> None:
    """Raises ValueError naming every setting that vLLM does not honour, or that there is no vLLM."""
    problems = [*_refused(config), *_temperatures(config)]
    if config.trainer.rollout_gpus is not None:
        problems.append(
            f"trainer.rollout_gpus={config.trainer.rollout_gpus} with {ROLLOUT}.name=vllm: vLLM has to start in every "
            "process of the run, and here some would only train; leave it null"
        )
    if importlib.util.find_spec("vllm") is None:
        problems.append(
            f"{ROLLOUT}.name=vllm: vexact-vllm is installed without vLLM itself; from vexact's source tree: "
            "pip install 'submodules/vllm[cpu]' (on a GPU machine [gpu])"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _refused(config: Config) -> Iterator[str]:
    for key, value in config.changed().items():
        name = key.removeprefix(f"{ROLLOUT}.")
        if name != key and name.split(".")[0] not in _HONOURED:
            yield f"{key}={value}: rollout.name=vllm does not have it: {_WHY.get(name, _OWN)}"


def _temperatures(config: Config) -> Iterator[str]:
    rollout = config.rollout
    keys = {"temperature": rollout.temperature, "val_kwargs.temperature": rollout.val_kwargs.temperature}
    for name, value in keys.items():
        if 0 < value < LEAST_TEMPERATURE:
            yield f"{ROLLOUT}.{name}={value}: vLLM samples at {LEAST_TEMPERATURE} at least; raise it"


def engine_arguments(config: Config, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``."""
    rollout, on_gpu = config.rollout, device.type == "cuda"
    arguments: dict[str, Any] = {
        "model": config.model.path,
        "dtype": config.dtype(device.type),
        "seed": config.rollout_seed & (2**31 - 1),  # of the process; every request has one of its own
        "max_model_len": config.max_model_len,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, rollout.max_num_seqs),  # vLLM insists
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "kv_cache_memory_bytes": _kv_cache_bytes(config, device),
        "enforce_eager": rollout.enforce_eager or not on_gpu,
        "enable_sleep_mode": on_gpu and rollout.free_cache_engine,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # the checkpoint's would change sampling parameters
        "logprobs_mode": "processed_logprobs",  # after the temperature, as the trainer computes them
        "trust_remote_code": False,
    }
    if on_gpu:
        # vLLM does not start unless this share of all memory is free, and some is the actor's
        share = arguments["kv_cache_memory_bytes"] / torch.cuda.mem_get_info(device)[1]
        arguments["gpu_memory_utilization"] = min(1.0, max(0.01, share))
    if rollout.cudagraph_capture_sizes is not None:
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted(rollout.cudagraph_capture_sizes)}
    return arguments


def _kv_cache_bytes(config: Config, device: torch.device) -> int:
    """Our meaning of the two keys: vLLM's gpu_memory_utilization is a share of all memory, weights included."""
    if config.rollout.kv_cache_bytes is not None:
        return config.rollout.kv_cache_bytes
    if device.type != "cuda":
        return CPU_KV_CACHE_BYTES
    return int(torch.cuda.mem_get_info(device)[0] * config.rollout.gpu_memory_utilization)
