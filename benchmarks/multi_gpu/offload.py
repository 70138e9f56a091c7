"""What a run has to keep elsewhere or to give back, by its memory plan: no more than that, since it costs time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.trainer.grpo_run import ACTOR, ROLLOUT
from vexact.config import load_config
from vexact.config.memory import Machine, ModelShape, Placement, memory_plan

FSDP = f"{ACTOR}.fsdp_config"
FULL = 0.92  # of a GPU: the plan may be off by the rest


def least_offload(overrides: Sequence[str], machine: Machine) -> list[str]:
    """Overrides: nothing offloaded if that fits, else moments, else master weights, too, else both and a rollout that
    sleeps, if it trains on the same GPUs; where nothing fits, what needs least."""
    choices = [
        [f"{FSDP}.optimizer_offload={moments}", f"{FSDP}.param_offload={weights}"]
        for moments, weights in (("false", "false"), ("true", "false"), ("true", "true"))
    ]
    if machine.device_bytes is None:
        return []
    if load_config(overrides, checked=False).trainer.rollout_gpus is None:
        choices.append([*choices[-1], f"{ROLLOUT}.enable_sleep_mode=true"])
    totals = []
    for choice in choices:
        config = load_config([*overrides, *choice], checked=False)
        placement, shape = Placement.of(config, machine.gpus), ModelShape.read(config.model.path)
        totals.append(memory_plan(config, shape, placement, machine.device).worst().total)
    fitting = [number for number, total in enumerate(totals) if total <= FULL * machine.device_bytes]
    return choices[fitting[0] if fitting else totals.index(min(totals))]
