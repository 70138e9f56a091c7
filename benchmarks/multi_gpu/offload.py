"""What a run has to keep in host memory, by its memory plan: no more than that, since it costs time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.trainer.grpo_run import ACTOR
from vexact.config import load_config
from vexact.config.memory import Machine, ModelShape, Placement, memory_plan

FSDP = f"{ACTOR}.fsdp_config"
FULL = 0.92  # of a GPU: the plan may be off by the rest


def least_offload(overrides: Sequence[str], machine: Machine) -> list[str]:
    """Overrides: nothing offloaded if that fits, else moments, else master weights, too."""
    choices = [
        [f"{FSDP}.optimizer_offload={moments}", f"{FSDP}.param_offload={weights}"]
        for moments, weights in (("false", "false"), ("true", "false"), ("true", "true"))
    ]
    if machine.device_bytes is None:
        return []
    for choice in choices:
        config = load_config([*overrides, *choice], checked=False)
        placement = Placement.of(config, machine.gpus)
        shape = ModelShape.read(config.model.path)
        if memory_plan(config, shape, placement, machine.device).worst().total <= FULL * machine.device_bytes:
            return choice
    return choices[-1]
