"""The start-up plan: what a run will do, in numbers, before it does it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vexact.config.fields import ConfigError
from vexact.config.schema import Config
from vexact.env import TRITON_INVARIANT

GIB = 1024**3
CPU_KV_CACHE_BYTES = 256 * 2**20  # the engine's own default
TRAINING_BYTES_PER_PARAMETER = 16  # fp32 master weight, gradient and AdamW's two moments
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Plan:
    """``rows`` are (name, value) pairs to print; ``advice`` are full sentences, most important first."""

    rows: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]

    def text(self) -> str:
        """Plain lines, names aligned."""
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows]
        return "\n".join([*lines, *(f"note: {sentence}" for sentence in self.advice)])


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the memory estimate needs to know about a checkpoint."""

    num_parameters: int
    kv_values_per_token: int  # keys and values of all layers

    @classmethod
    def read(cls, directory: str) -> ModelShape:
        """From config.json of a decoder checkpoint.

        Raises:
            ConfigError: the file is not JSON, or lacks the sizes of a decoder.
        """
        path = Path(directory).expanduser() / "config.json"
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        except KeyError as error:
            raise ConfigError(f"{path} has no {error}: it does not describe a decoder model") from error

    @classmethod
    def of(cls, sizes: dict[str, Any]) -> ModelShape:
        """Weight matrices and norms of a dense decoder; biases are too small to matter."""
        hidden, layers, heads = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
        kv_heads = sizes.get("num_key_value_heads") or heads
        head_dim = sizes.get("head_dim") or hidden // heads
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        layer = attention + 3 * hidden * sizes["intermediate_size"] + 2 * hidden
        tables = 1 if sizes.get("tie_word_embeddings") else 2
        return cls(layers * layer + tables * sizes["vocab_size"] * hidden + hidden, 2 * layers * kv_heads * head_dim)


def build_plan(config: Config, device: str, shape: ModelShape | None = None) -> Plan:
    """
    Args:
        config: a checked configuration.
        device: "cpu" or "cuda".
        shape: the model's sizes; None reads them from its directory.
    """
    shape = shape or ModelShape.read(config.model.path)
    rows = (
        ("run directory", str(config.run_dir)),
        ("model", f"{config.model.path} ({_count(shape.num_parameters)} parameters, {config.dtype(device)}, {device})"),
        ("data", ", ".join(config.data.train_files) or "none"),
        ("step", _step_row(config)),
        ("updates", _updates_row(config)),
        ("lengths", f"prompt {config.data.max_prompt_length} + response {config.data.max_response_length} tokens"),
        (
            "algorithm",
            f"{config.algorithm.adv_estimator}, {config.actor.policy_loss.loss_mode} loss, lr "
            f"{config.actor.optim.lr:g}",
        ),
        ("attention", _attention_row(config)),
        ("exactness", _exactness_row(config)),
        ("memory", _memory_row(config, device, shape)),
        ("changed keys", _changed_row(config)),
    )
    return Plan(rows, (*config.notices, *_advice(config, device, shape)))


def kv_cache_tokens(config: Config, device: str, shape: ModelShape) -> int | None:
    """Tokens the key-value cache holds; None on a GPU whose free memory decides."""
    rollout = config.rollout
    pages_of_all = rollout.max_num_seqs * -(-config.max_model_len // rollout.page_size)
    if rollout.num_pages is not None:
        return rollout.num_pages * rollout.page_size
    budget = rollout.kv_cache_bytes or (CPU_KV_CACHE_BYTES if device == "cpu" else None)
    if budget is None:
        return None
    page_bytes = shape.kv_values_per_token * BYTES[config.dtype(device)] * rollout.page_size
    return min(budget // page_bytes, pages_of_all) * rollout.page_size


def _step_row(config: Config) -> str:
    return (
        f"{config.data.train_batch_size} prompts x {config.rollout.n} samples = {config.sequences_per_step} sequences"
    )


def _updates_row(config: Config) -> str:
    total = config.optimizer_steps_per_rollout
    return f"{total} optimizer step{'s' if total > 1 else ''} per rollout, 1 of {total} exactly on-policy"


def _attention_row(config: Config) -> str:
    rollout = config.rollout.attn_impl
    if not config.rollout.batch_invariant:
        rollout = f"{'sdpa' if rollout == TRITON_INVARIANT else rollout}, with all other operators stock too"
    return f"{rollout} (rollout), {config.actor.attn_implementation} (trainer)"


def _exactness_row(config: Config) -> str:
    if config.trainer.exactness == "off":
        return "off: nothing is compared"
    action = "stop at the first unequal bit" if config.trainer.exactness == "strict" else "log unequal bits and go on"
    return f"{config.trainer.exactness}: {action}"


def _memory_row(config: Config, device: str, shape: ModelShape) -> str:
    size = BYTES[config.dtype(device)]
    training = shape.num_parameters * TRAINING_BYTES_PER_PARAMETER
    rollout = shape.num_parameters * size
    reference = shape.num_parameters * size if config.needs_reference else 0
    parts = [f"training {_size(training)}", f"rollout weights {_size(rollout)}"]
    if reference:
        parts.append(f"reference {_size(reference)}")
    total = training + rollout + reference
    tokens = kv_cache_tokens(config, device, shape)
    if tokens is None:
        parts.append(f"key-value cache {config.rollout.gpu_memory_utilization:.0%} of what is free")
    else:
        cache = tokens * shape.kv_values_per_token * size
        total += cache
        parts.append(f"key-value cache {_size(cache)} ({tokens} tokens)")
    return f"about {_size(total)} without activations: {', '.join(parts)}"


def _changed_row(config: Config) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in config.changed().items()) or "none"


def _advice(config: Config, device: str, shape: ModelShape) -> list[str]:
    advice = []
    total = config.optimizer_steps_per_rollout
    if total > 1:
        advice.append(
            f"only 1 of {total} updates per rollout is exactly on-policy; for all of them leave "
            "actor_rollout_ref.actor.ppo_mini_batch_size null and ppo_epochs 1"
        )
    sharing = config.actor.ulysses_sequence_parallel_size
    if sharing > 1:
        advice.append(
            f"{sharing} GPUs share each packed forward: log-probabilities keep their bits, and weights after an update "
            f"are those of actor_rollout_ref.actor.ulysses_sequence_parallel_size={sharing}, on any number of GPUs"
        )
    tokens = kv_cache_tokens(config, device, shape)
    if tokens is not None and tokens < config.max_model_len:
        advice.append(
            f"the key-value cache holds {tokens} tokens, less than one sequence of {config.max_model_len}; raise "
            "actor_rollout_ref.rollout.kv_cache_bytes or num_pages"
        )
    if config.trainer.save_freq == -1:
        advice.append("only the last step is saved; set trainer.save_freq to be able to resume earlier")
    return advice


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
