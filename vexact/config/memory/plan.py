"""Bytes on every GPU, by part and by stage of a step, before anything is allocated.

A GPU that trains and samples (colocated) holds both sides' parts in every stage; with ``trainer.rollout_gpus`` each GPU
holds one side's. Everything here is arithmetic on the configuration and the model's sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vexact.config.memory.model_shape import ModelShape
from vexact.config.memory.parts import GIB, KV_CACHE, MIB, ROLLOUT_WEIGHTS, Parts, Stage
from vexact.config.memory.placement import Placement
from vexact.config.schema import Config

CONTEXT_BYTES = 1 * GIB  # CUDA context, libraries, and what the allocator holds but cannot use
NCCL_BYTES = GIB // 2
BUCKET_BYTES = 256 * MIB  # weights on their way to the rollout: one bucket is gathered while another is copied

Role = Literal["GPU", "trainer GPU", "rollout GPU"]
STAGES: dict[Role, tuple[Stage, ...]] = {
    "GPU": ("generation", "update", "sync"),
    "trainer GPU": ("update", "sync"),
    "rollout GPU": ("generation", "sync"),
}


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one GPU holds in one stage: bytes by part, and what the key-value cache would like beyond its least."""

    role: Role
    stage: Stage
    parts: dict[str, int]
    elastic: int = 0

    @property
    def total(self) -> int:
        """Without the elastic part."""
        return sum(self.parts.values())

    @property
    def text(self) -> str:
        """The parts, largest first."""
        by_size = sorted(self.parts.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {size_text(size)}" for name, size in by_size)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Every stage of every kind of GPU."""

    stages: tuple[StageMemory, ...]
    host: int  # bytes that the process of a GPU that trains keeps in the memory of its machine
    host_at_resume: int  # the same while it reads a checkpoint
    kv_cache_bytes: int | None  # of an elastic cache: what fits beside all else; None: a key or the device fixes it

    @property
    def rollout_weights(self) -> int:
        """Bytes of one replica's."""
        return max(stage.parts.get(ROLLOUT_WEIGHTS, 0) for stage in self.stages)

    @property
    def trainer(self) -> Role:
        """What trains."""
        return self.stages[0].role

    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.total)


def memory_plan(
    config: Config, shape: ModelShape, placement: Placement, device: str, device_bytes: int | None = None
) -> MemoryPlan:
    """
    Args:
        config: a checked configuration.
        device: "cpu" or "cuda".
        device_bytes: free on each GPU before anything is allocated; None where that is not known.
    """
    parts = Parts(config, shape, placement, device)
    roles: tuple[Role, ...] = ("GPU",) if placement.is_colocated else ("trainer GPU", "rollout GPU")
    stages = [_stage(parts, role, stage) for role in roles for stage in STAGES[role]]
    if parts.fixed_kv_cache is not None:
        return MemoryPlan(tuple(stages), parts.host, parts.host_at_resume, None)
    least = parts.least_kv_cache
    if device_bytes is None:
        return MemoryPlan(tuple(stages), parts.host, parts.host_at_resume, least)
    wanted = max(least, parts.wanted_kv_cache(device_bytes))
    holders = [stage for stage in stages if KV_CACHE in stage.parts]
    room = least + min(device_bytes - stage.total for stage in holders)
    stages = [replace(stage, elastic=wanted - least) if stage in holders else stage for stage in stages]
    return MemoryPlan(tuple(stages), parts.host, parts.host_at_resume, max(least, min(wanted, room)))


def _stage(parts: Parts, role: Role, stage: Stage) -> StageMemory:
    held: dict[str, int] = {}
    if role != "rollout GPU":
        held |= parts.training(stage)
    if role != "trainer GPU":
        held |= parts.rollout(stage, trains=role == "GPU")
    if parts.device == "cuda":
        held["buckets"] = 2 * BUCKET_BYTES if stage == "sync" else 0
        held["CUDA"] = CONTEXT_BYTES + (NCCL_BYTES if parts.placement.total > 1 else 0)
    return StageMemory(role, stage, {name: size for name, size in held.items() if size})


def memory_rows(plan: MemoryPlan, device_bytes: int | None) -> list[tuple[str, str]]:
    """A line of the start-up plan per stage; of a sync only where nothing of its GPU needs more."""
    free = "" if device_bytes is None else f" of {size_text(device_bytes)}"
    rows = []
    for stage in plan.stages:
        largest = max(other.total for other in plan.stages if other.role == stage.role)
        if stage.stage == "sync" and stage.total < largest:
            continue
        cache = f", and up to {size_text(stage.elastic)} more of key-value cache" if stage.elastic else ""
        where = "" if stage.role == "GPU" else f" on a {stage.role}"
        rows.append(("memory", f"{stage.stage} {size_text(stage.total)}{free}{where}: {stage.text}{cache}"))
    held = [f"{size_text(plan.host)} per {plan.trainer} in the machine's own"] if plan.host else []
    if plan.host_at_resume > plan.host:
        where = "" if held else f" per {plan.trainer} in the machine's own"
        held.append(f"{size_text(plan.host_at_resume)}{where} while a resume reads its checkpoint")
    return [*rows, ("memory", ", ".join(held))] if held else rows


def size_text(size: int) -> str:
    """Bytes for people.

    >>> size_text(3 * 2**30), size_text(15 * 2**20)
    ('3.0 GiB', '15 MiB')
    """
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"
