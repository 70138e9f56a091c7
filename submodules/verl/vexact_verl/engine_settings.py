"""verl's configuration of a rollout as an engine's; what could not be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING
from vexact.rollout import EngineConfig

_SHARED = (  # keys that verl's rollout and vexact's engine have in common
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "seed",
)
_OF_SERVER = ("free_cache_engine", "enable_sleep_mode")  # verl's keys, which the server itself reads
_DTYPE = "weights are computed with as the trainer does, in rollout.dtype"
# Keys of verl's rollout: the values that, as null does, mean what the engine does anyway, and why there are no others.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization": ((), _DTYPE),
    "quantization_config_file": ((), _DTYPE),
    "qat.enable": ((False,), _DTYPE),
    "mtp.enable_rollout": ((False,), "tokens are not guessed ahead"),
    "logprobs_mode": (("processed_logprobs",), "log-probabilities are those after temperature and truncation"),
    "repetition_penalty": ((1.0,), REFUSED_SAMPLING["repetition_penalty"][1]),
    "scheduling_policy": (("fcfs",), "requests are served in their order"),
    "over_sample_rate": ((0.0,), "every request runs to its end"),
    "enable_rollout_routing_replay": ((False,), "rollout and trainer choose the same experts: nothing to replay"),
    "moe_load_balance_metrics_interval": ((0,), "the rollout does not report the load of its experts"),
    "prometheus.enable": ((False,), "the server has no port for it"),
}


def engine_settings(config: RolloutConfig) -> dict[str, Any]:
    """verl's keys, and those of ``rollout.engine_kwargs.vexact``, for ``Engine``.

    Raises ValueError for keys that the engine does not have, or that verl has another one for, and listing all that it
    could not honour.
    """
    if refused := list(_refused(config)):
        raise ValueError("rollout.name=vexact: " + "; ".join(refused))
    given: Any = config.engine_kwargs.get("vexact", None) or {}
    own: dict[str, Any] = dict(OmegaConf.to_container(given) if OmegaConf.is_config(given) else given)  # type: ignore[arg-type]
    known = {field.name for field in fields(EngineConfig)} - {*_SHARED, *_OF_SERVER, "max_model_len"}
    if unknown := sorted(own.keys() - known):
        raise ValueError(
            f"rollout.engine_kwargs.vexact has {', '.join(unknown)}; the engine takes {', '.join(sorted(known))} there"
        )
    if (sizes := config.cudagraph_capture_sizes) is not None:
        own["cudagraph_capture_sizes"] = tuple(sizes)
    longest = config.max_model_len or config.prompt_length + config.response_length
    return {key: getattr(config, key) for key in _SHARED} | {"max_model_len": longest} | own


def _refused(config: RolloutConfig) -> Iterator[str]:
    for key, (harmless, reason) in _REFUSED.items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name, None) if value is not None else None
        if value is not None and value not in harmless:
            yield f"rollout.{key}={value}: {reason}; use {harmless[0] if harmless else 'null'}"
