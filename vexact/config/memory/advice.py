"""What to change when the memory plan does not fit, or when a GPU ran out of memory all the same."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any, Literal

from vexact.config.memory.model_shape import ModelShape
from vexact.config.memory.placement import Placement
from vexact.config.memory.plan import MemoryPlan, StageMemory, memory_plan, size_text
from vexact.config.schema import Config

MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TIGHT = 0.92  # of a GPU: the estimate may be off by as much
MOST_GPUS = 4096

MemoryStage = Literal["start-up", "generation", "update", "sync", "any"]


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What a run has: "cpu" or "cuda", and bytes that are free before it begins (None: not known)."""

    device: str
    gpus: int = 1  # visible in every machine; on a CPU the processes to start
    device_bytes: int | None = None  # on each GPU; on a CPU for each process
    host_bytes: int | None = None  # of the machine, for each GPU in it


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryProblem:
    """What does not fit, and the settings that would."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


def memory_problems(config: Config, shape: ModelShape, machine: Machine) -> list[MemoryProblem]:
    """Why the run cannot fit, with what to change and by how much; empty when it can."""
    placement = Placement.of(config, machine.gpus)
    plan = _plan(config, shape, placement, machine)
    problems = []
    worst = plan.worst()
    if machine.device_bytes is not None and worst.total > machine.device_bytes:
        what = (
            f"{worst.stage} needs {size_text(worst.total)} on each {_noun(worst, machine)} and "
            f"{size_text(machine.device_bytes)} are free, {size_text(worst.total - machine.device_bytes)} too little "
            f"({worst.text})"
        )
        fix = _fix(config, shape, placement, machine)
        if machine.device == "cpu" and machine.gpus > 1:
            fix = f"{fix}; or start fewer than {machine.gpus} processes, which share the machine's memory"
        problems.append(MemoryProblem(what, fix))
    host = _host_bytes(placement, machine)
    if host is not None and plan.host > host:
        what = f"what is offloaded or copied takes {size_text(plan.host)} per {plan.trainer} of the machine's memory"
        fix = f"set {' or '.join(_host_remedies(config))}, or use more GPUs"
        problems.append(MemoryProblem(f"{what} and {size_text(host)} are free for each", fix))
    return problems


def resume_note(config: Config, shape: ModelShape, machine: Machine) -> str | None:
    """That the run would fit, and a resume of it would not: it holds what it reads beside what is there."""
    placement = Placement.of(config, machine.gpus)
    plan, host = _plan(config, shape, placement, machine), _host_bytes(placement, machine)
    if host is None or plan.host_at_resume <= host or plan.host > host:
        return None
    return (
        f"reading a checkpoint to go on from takes {size_text(plan.host_at_resume)} per {plan.trainer} of the "
        f"machine's memory, and {size_text(host)} are free for each: to resume, use more GPUs or a machine with more"
    )


def _host_bytes(placement: Placement, machine: Machine) -> int | None:
    """For each GPU that trains, in the machine that has most of them: the first ones do."""
    if machine.host_bytes is None:
        return None
    return machine.host_bytes * machine.gpus // min(machine.gpus, placement.trainers)


def memory_notes(config: Config, shape: ModelShape, machine: Machine) -> list[str]:
    """What is tight in a plan that fits; nothing for one that does not."""
    if machine.device_bytes is None:
        return []
    plan, free = _plan(config, shape, Placement.of(config, machine.gpus), machine), machine.device_bytes
    notes = list(filter(None, [resume_note(config, shape, machine)]))
    worst = plan.worst()
    if worst.total > free:
        return []
    if worst.total > TIGHT * free:
        knob = f"{ACTOR}.ppo_max_token_len_per_gpu" if worst.stage == "update" else f"{ROLLOUT}.max_num_seqs"
        notes.append(
            f"memory is tight: {worst.stage} needs about {size_text(worst.total)} of {size_text(free)} on each "
            f"{_noun(worst, machine)}; lower {knob} if it runs out"
        )
    crowded = [stage for stage in plan.stages if stage.elastic and stage.total + stage.elastic > free]
    if crowded and plan.kv_cache_bytes is not None:
        wanted = plan.kv_cache_bytes / (free - plan.rollout_weights)
        notes.append(
            f"{ROLLOUT}.gpu_memory_utilization={config.rollout.gpu_memory_utilization:g} would leave too little for "
            f"{crowded[0].stage}: beside all else a key-value cache of {size_text(plan.kv_cache_bytes)} fits, a share "
            f"of {int(100 * wanted) / 100:g}"
        )
    return notes


def out_of_memory_advice(config: Config, stage: MemoryStage) -> str:
    """What to change after memory ran out in ``stage``, with the values in force; what costs least comes first."""
    knobs = {
        "start-up": [*_cache_knobs(config), *_offload_knobs(config), "more GPUs"],
        "generation": [*_cache_knobs(config), *_batch_knobs(config), *_offload_knobs(config)],
        "update": [
            *_release_knobs(config),
            *_sleep_knobs(config),
            *_token_knobs(config),
            *_offload_knobs(config),
            "more GPUs",
        ],
        "sync": [*_release_knobs(config), *_offload_knobs(config), *_cache_knobs(config)],
        "any": [
            *_release_knobs(config),
            *_sleep_knobs(config),
            *_token_knobs(config),
            *_cache_knobs(config),
            *_offload_knobs(config),
            "more GPUs",
        ],
    }[stage]
    return "; ".join(knobs)


def _noun(stage: StageMemory, machine: Machine) -> str:
    return "process" if machine.device == "cpu" else stage.role


def _plan(config: Config, shape: ModelShape, placement: Placement, machine: Machine) -> MemoryPlan:
    return memory_plan(config, shape, placement, machine.device, machine.device_bytes)


def _fix(config: Config, shape: ModelShape, placement: Placement, machine: Machine) -> str:
    """The settings that make the plan fit: each that does alone, else the fewest that do together, else GPUs that only
    sample, else more GPUs."""

    def excess(changed: Config, where: Placement = placement) -> int:
        assert machine.device_bytes is not None
        return _plan(changed, shape, where, machine).worst().total - machine.device_bytes

    before = excess(config)
    alone = [
        f"{key}={_value(value)} ({size_text(before - excess(changed))} less)"
        for key, value, changed in _remedies(config, excess)
        if excess(changed) <= 0
    ]
    if alone:
        return f"set {' or '.join(alone)}"
    settings, best = _together(config, excess)
    if excess(best) <= 0:
        return f"set {' and '.join(settings)}"
    no_room = "no setting makes room for it"
    factor = 1 if machine.device == "cuda" else MOST_GPUS
    while placement.total * factor <= MOST_GPUS:
        more = dataclasses.replace(
            placement, trainers=placement.trainers * factor, replicas=placement.replicas * factor
        )
        for settings, where in _placements(more):
            others, best = _together(config, lambda changed, where=where: excess(changed, where))  # type: ignore[misc]
            needed = " and ".join([*settings, *others])
            if excess(best, where) <= 0:
                if factor == 1:
                    return f"set {needed}"
                return f"{no_room} here: use {where.total} GPUs{needed and f' with {needed}'}, or a smaller model"
        factor *= 2
    return f"{no_room}: use a smaller model or a GPU with more memory"


def _placements(placement: Placement) -> Iterator[tuple[list[str], Placement]]:
    """As it is, and with a quarter of the GPUs for the rollout alone, whose whole copy of the weights trainers then do
    not hold; each with the setting that it takes."""
    yield [], placement
    if placement.is_colocated and placement.total > 1:
        apart = max(1, placement.total // 4)
        yield [f"trainer.rollout_gpus={apart}"], Placement(placement.total - apart, apart, False)


def _together(config: Config, excess: Callable[[Config], int]) -> tuple[list[str], Config]:
    settings = []
    while excess(config) > 0:
        steps = [(excess(changed), key, value, changed) for key, value, changed in _remedies(config, excess)]
        useful = [step for step in steps if step[0] < excess(config)]
        if not useful:
            break
        fitting = [step for step in useful if step[0] <= 0]
        _, key, value, config = (fitting or sorted(useful, key=lambda step: step[0]))[0]
        settings.append(f"{key}={_value(value)}")
    return settings, config


def _remedies(config: Config, excess: Callable[[Config], int]) -> Iterator[tuple[str, Any, Config]]:
    """Key, value and changed configuration of everything that needs less memory; what costs least comes first."""
    fsdp = config.actor.fsdp_config
    switches = {
        f"{ROLLOUT}.free_cache_engine": config.rollout.free_cache_engine,
        f"{ROLLOUT}.enable_sleep_mode": config.rollout.enable_sleep_mode or not _can_sleep(config),
        f"{MODEL}.enable_gradient_checkpointing": config.model.enable_gradient_checkpointing,
        f"{ACTOR}.fsdp_config.optimizer_offload": fsdp.optimizer_offload,
        f"{ACTOR}.fsdp_config.param_offload": fsdp.param_offload,
    }
    for key, is_on in switches.items():
        if not is_on:
            yield key, True, with_value(config, key, True)
    if config.model.enable_gradient_checkpointing and isinstance(config.model.recompute_num_layers, int):
        key = f"{MODEL}.recompute_num_layers"
        yield key, None, with_value(config, key, None)
    for key, now, least, step in _numbers(config):
        if now > least:
            tried = range(least, now, step)
            fitting = bisect_left(tried, True, key=lambda value: excess(with_value(config, key, value)) > 0)
            value = tried[max(0, fitting - 1)]
            yield key, value, with_value(config, key, value)


def _numbers(config: Config) -> Iterator[tuple[str, int, int, int]]:
    """Key, value in force, smallest value that works, and the step in which to try values between."""
    rollout, least = config.rollout, _least_tokens(config)
    tokens = config.actor.ppo_max_token_len_per_gpu
    yield f"{ACTOR}.ppo_max_token_len_per_gpu", tokens, least, 256
    pages = -(-config.max_model_len // rollout.page_size)
    if rollout.num_pages is not None:
        yield f"{ROLLOUT}.num_pages", rollout.num_pages, pages, 1
    if rollout.kv_cache_bytes is not None:
        yield f"{ROLLOUT}.kv_cache_bytes", rollout.kv_cache_bytes, 2**20, 2**20
    batched = config.max_model_len if not rollout.enable_chunked_prefill else 512
    yield f"{ROLLOUT}.max_num_batched_tokens", rollout.max_num_batched_tokens, batched, 512
    yield f"{ROLLOUT}.max_num_seqs", rollout.max_num_seqs, 8, 8


def _least_tokens(config: Config) -> int:
    """The smallest token budget in which the ranks that share a forward hold one sequence."""
    needed = config.data.max_prompt_length + config.data.max_response_length
    return -(-needed // config.actor.ulysses_sequence_parallel_size)


def with_value(config: Any, key: str, value: Any) -> Any:
    """A copy of a section with one dotted key changed; nothing is checked."""
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cache_knobs(config: Config) -> Iterator[str]:
    rollout = config.rollout
    for name in ("num_pages", "kv_cache_bytes"):
        if getattr(rollout, name) is not None:
            yield f"a lower {ROLLOUT}.{name} (now {getattr(rollout, name)})"
            return
    yield f"a lower {ROLLOUT}.gpu_memory_utilization (now {rollout.gpu_memory_utilization:g})"


def _batch_knobs(config: Config) -> Iterator[str]:
    yield f"a lower {ROLLOUT}.max_num_seqs (now {config.rollout.max_num_seqs})"
    yield f"a lower {ROLLOUT}.max_num_batched_tokens (now {config.rollout.max_num_batched_tokens})"
    if not config.rollout.enforce_eager:
        yield f"{ROLLOUT}.enforce_eager=true"


def _host_remedies(config: Config) -> Iterator[str]:
    actor, trainer = config.actor, config.trainer
    if actor.checkpoint.async_save:
        yield f"{ACTOR}.checkpoint.async_save=false"
    for name in ("param_offload", "optimizer_offload"):
        if getattr(actor.fsdp_config, name):
            yield f"{ACTOR}.fsdp_config.{name}=false"
    if config.needs_reference and config.ref.fsdp_config.param_offload:
        yield "actor_rollout_ref.ref.fsdp_config.param_offload=false"
    if trainer.async_steps and trainer.async_audit_freq > 0:
        yield "trainer.async_audit_freq=-1 (past samples are not compared then)"


def _token_knobs(config: Config) -> Iterator[str]:
    tokens, least = config.actor.ppo_max_token_len_per_gpu, _least_tokens(config)
    if tokens > least:
        yield f"a lower {ACTOR}.ppo_max_token_len_per_gpu (now {tokens}, at least {least})"
    if not config.model.enable_gradient_checkpointing:
        yield f"{MODEL}.enable_gradient_checkpointing=true"
    elif config.model.recompute_num_layers is not None:
        yield f"{MODEL}.recompute_num_layers=null (now {config.model.recompute_num_layers})"


def _offload_knobs(config: Config) -> Iterator[str]:
    fsdp = config.actor.fsdp_config
    if not fsdp.optimizer_offload:
        yield f"{ACTOR}.fsdp_config.optimizer_offload=true"
    if not fsdp.param_offload:
        yield f"{ACTOR}.fsdp_config.param_offload=true"


def _release_knobs(config: Config) -> Iterator[str]:
    if not config.rollout.free_cache_engine and config.trainer.rollout_gpus is None:
        yield f"{ROLLOUT}.free_cache_engine=true"


def _sleep_knobs(config: Config) -> Iterator[str]:
    if not config.rollout.enable_sleep_mode and _can_sleep(config):
        yield f"{ROLLOUT}.enable_sleep_mode=true"


def _can_sleep(config: Config) -> bool:
    """Whether the rollout's weights could be given back while the same GPU trains."""
    rollout = config.rollout
    return rollout.is_own and rollout.free_cache_engine and config.trainer.rollout_gpus is None
