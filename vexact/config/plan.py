"""The start-up plan: what a run will do, in numbers, before it does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vexact.config.baseline import baseline_attention
from vexact.config.checks.rules import inexact
from vexact.config.memory import (
    BYTES,
    ExpertShape,
    Machine,
    ModelShape,
    Placement,
    kv_cache_tokens,
    memory_notes,
    memory_plan,
    memory_rows,
    with_recomputation,
)
from vexact.config.schema import Config

TRAINING_BYTES_PER_PARAMETER = 16  # fp32 master weight, gradient and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Plan:
    """``rows`` are (name, value) pairs to print; ``advice`` are full sentences, most important first."""

    rows: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]

    @property
    def memory(self) -> list[tuple[str, str]]:
        """The rows that say what every GPU will hold."""
        return [row for row in self.rows if row[0] == "memory"]

    def text(self) -> str:
        """Plain lines, names aligned."""
        width = max(len(name) for name, _ in self.rows)
        lines = [f"{name:<{width}}  {value}" for name, value in self.rows]
        return "\n".join([*lines, *(f"note: {sentence}" for sentence in self.advice)])


def build_plan(config: Config, machine: Machine | str, shape: ModelShape | None = None) -> Plan:
    """
    Args:
        config: a checked configuration.
        machine: "cpu" or "cuda", or also how many GPUs there are and what is free on them.
        shape: the model's sizes; None reads them from its directory.
    """
    shape = shape or ModelShape.read(config.model.path)
    machine = Machine(machine) if isinstance(machine, str) else machine
    device, placement = machine.device, Placement.of(config, machine.gpus)
    settled = with_recomputation(config, shape, machine)
    memory = memory_plan(settled, shape, placement, device, machine.device_bytes)
    rows = (
        ("run directory", str(config.run_dir)),
        ("model", f"{config.model.path} ({_parameters(shape)}, {config.dtype(device)}, {device})"),
        *(() if shape.experts is None else [("experts", _experts_row(config, shape.experts, shape.num_layers))]),
        ("data", ", ".join(config.data.val_files if config.trainer.val_only else config.data.train_files) or "none"),
        *_step_rows(config),
        ("lengths", f"prompt {config.data.max_prompt_length} + response {config.data.max_response_length} tokens"),
        ("attention", _attention_row(config, device, shape)),
        *_recomputation_rows(config, settled, shape.num_layers),
        ("exactness", _exactness_row(config)),
        ("placement", _placement_row(config, placement, device)),
        ("key-value cache", _cache_row(config, device, shape)),
        *memory_rows(memory, machine.device_bytes),
        ("changed keys", _changed_row(config)),
    )
    return Plan(rows, (*config.notices, *_advice(config, machine, shape)))


def _parameters(shape: ModelShape) -> str:
    total = f"{_count(shape.num_parameters)} parameters"
    if shape.experts is None:
        return total
    return f"{total}, {_count(shape.num_active_parameters)} of them for one token"


def _experts_row(config: Config, experts: ExpertShape, num_layers: int) -> str:
    shared = " and a shared one" if experts.shared_intermediate_size else ""
    coefficient, rate = config.actor.router_aux_loss_coef, config.actor.router_bias_update_rate
    ways = [f"a bias that moves by {rate:g} a step"] if rate else []
    if coefficient is None:
        ways.append("the loss of config.json, if it asks for one")
    elif coefficient:
        ways.append(f"a loss of weight {coefficient:g}")
    balanced = f"balanced by {' and '.join(ways)}" if ways else "not balanced"
    return (
        f"{experts.top_k} of {experts.num_experts} a token{shared}, in {experts.num_layers} of {num_layers} layers; "
        f"{balanced}"
    )


def _step_rows(config: Config) -> list[tuple[str, str]]:
    if config.trainer.val_only:
        return [("step", "none: trainer.val_only=true validates and stops")]
    prompts, algorithm = config.data.train_batch_size, config.algorithm.adv_estimator
    return [
        ("step", f"{prompts} prompts x {config.rollout.n} samples = {config.sequences_per_step} sequences"),
        ("updates", _updates_row(config)),
        ("algorithm", f"{algorithm}, {config.loss_mode} loss, lr {config.actor.optim.lr:g}"),
    ]


def _updates_row(config: Config) -> str:
    total, cause = config.optimizer_steps_per_rollout, inexact(config)
    exact = f"1 of {total} exactly on-policy"
    if config.trainer.async_steps:
        exact = "on samples one weights version old"
    elif cause:
        exact = f"none exactly on-policy ({cause})"
    return f"{total} optimizer step{'s' if total > 1 else ''} per rollout, {exact}"


def _placement_row(config: Config, placement: Placement, device: str) -> str:
    sleeps = "; the rollout's weights are given back for every update" if config.rollout.enable_sleep_mode else ""
    return f"{placement.text(device)}{sleeps}"


def _attention_row(config: Config, device: str, shape: ModelShape) -> str:
    rollout = config.rollout.attn_impl
    if not config.rollout.is_own:
        rollout = f"that of {config.rollout.name}"
    elif not config.rollout.batch_invariant:
        dtype = config.dtype(device)
        found = baseline_attention(rollout, device, dtype, key_dim=shape.key_dim, value_dim=shape.value_dim)
        rollout = f"{found}, with all other operators stock"
    return f"{rollout} (rollout), {config.actor.attn_implementation} (trainer)"


def _recomputation_rows(config: Config, settled: Config, num_layers: int) -> list[tuple[str, str]]:
    """Of layers that do not all do the same."""
    number, given = settled.model.recomputed_of(num_layers), config.model.recompute_num_layers
    if given is None or config.trainer.val_only or not config.model.enable_gradient_checkpointing:
        return []
    chosen = ", as few as fit" if given == "auto" else ""
    return [("recomputed", f"{number} of {num_layers} layers in the backward{chosen}")]


def _cache_row(config: Config, device: str, shape: ModelShape) -> str:
    """What a cached token takes, and of what."""
    dtype = config.dtype(device)
    return (
        f"{shape.kv_values_per_token * BYTES[dtype]} bytes a token: {shape.num_layers} layers of {shape.num_kv_heads} "
        f"keys of {shape.key_dim} and values of {shape.value_dim} numbers, {dtype}"
    )


def _exactness_row(config: Config) -> str:
    if config.trainer.val_only:
        return "nothing is trained, so nothing is compared"
    if config.trainer.exactness == "off":
        return "off: nothing is compared"
    action = "stop at the first unequal bit" if config.trainer.exactness == "strict" else "log unequal bits and go on"
    return f"{config.trainer.exactness}: {_compared_when(config)}{action}"


def _compared_when(config: Config) -> str:
    every = config.trainer.async_audit_freq
    if not config.trainer.async_steps:
        return ""
    if every < 0:
        return "in step 1 only, "
    return f"in {'every step' if every == 1 else f'1 step of {every}'}, under the weights that sampled, "


def _changed_row(config: Config) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in config.changed().items()) or "none"


def _advice(config: Config, machine: Machine, shape: ModelShape) -> list[str]:
    advice = memory_notes(config, shape, machine)
    if not config.trainer.val_only:
        advice += _training_advice(config, shape)
    tokens = kv_cache_tokens(config, machine.device, shape)
    if tokens is not None and tokens < config.max_model_len:
        advice.append(
            f"the key-value cache holds {tokens} tokens, less than one sequence of {config.max_model_len}; raise "
            "actor_rollout_ref.rollout.kv_cache_bytes or num_pages"
        )
    return advice


def _training_advice(config: Config, shape: ModelShape) -> list[str]:
    advice: list[str] = []
    total = config.optimizer_steps_per_rollout
    if config.trainer.async_steps:
        advice.append(
            "trainer.async_steps=1: every step but the first trains on samples of the weights before the last update, "
            "with importance ratios to the log-probabilities they were sampled with; trainer.async_steps=0 is exactly "
            "on-policy"
        )
        if config.trainer.async_audit_freq < 0 and config.trainer.exactness != "off":
            advice.append("trainer.async_audit_freq=-1: after the first step nothing compares rollout and trainer")
    elif total > 1 and not inexact(config):
        advice.append(
            f"only 1 of {total} updates per rollout is exactly on-policy; for all of them leave "
            "actor_rollout_ref.actor.ppo_mini_batch_size null and ppo_epochs 1"
        )
    advice += _learning_rate_advice(config)
    if config.algorithm.use_kl_in_reward and config.actor.use_kl_loss:
        advice.append("the KL to the reference policy counts twice: in the reward and in the loss")
    rollout = config.rollout
    if (rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0) and (config.needs_reference or total > 1):
        advice.append(
            "with top_k, top_p or min_p, the KL term and the updates after the first compare other weights over the "
            "tokens whose logit reaches the sampler's threshold, which need not be the tokens it kept "
            "(docs/numerics.md): approximate"
        )
    sharing = config.actor.ulysses_sequence_parallel_size
    if sharing > 1:
        advice.append(
            f"{sharing} GPUs share each packed forward: log-probabilities keep their bits, and weights after an update "
            f"are those of actor_rollout_ref.actor.ulysses_sequence_parallel_size={sharing}, on any number of GPUs"
        )
    groups = config.actor.fsdp_config.expert_parallel_size
    if groups > 1 and shape.experts is not None:
        advice.append(
            f"{groups} groups of training GPUs share the {shape.experts.num_experts} experts of a layer: tokens travel "
            "to them, and no bit depends on it"
        )
    if config.trainer.save_freq == -1:
        advice.append("only the last step is saved; set trainer.save_freq to be able to resume earlier")
    return advice


def _learning_rate_advice(config: Config) -> list[str]:
    optim, total = config.actor.optim, config.trainer.total_training_steps
    if optim.lr == 0:
        return ["actor_rollout_ref.actor.optim.lr=0: no weight ever changes"]
    if total is None:
        return []
    steps = optim.lr_warmup_steps if optim.lr_warmup_steps >= 0 else int(optim.lr_warmup_steps_ratio * total)
    if steps < total:
        return []
    return [f"the learning rate still rises when the run ends: {steps} steps of warm-up of {total} in all"]


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
