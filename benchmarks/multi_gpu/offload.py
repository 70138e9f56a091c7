"""What a run has to keep elsewhere or to give back, by its memory plan: no more than that, since it costs time."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.trainer.grpo_run import ACTOR, ROLLOUT
from vexact.config import load_config
from vexact.config.memory import Machine, ModelShape, Placement, memory_plan

FSDP = f"{ACTOR}.fsdp_config"
FULL = 0.92  # of a GPU: the plan may be off by the rest


CHOICES = (  # moments and master weights in host memory, a rollout that sleeps; what costs least comes first
    (False, False, False),
    (True, False, False),
    (True, False, True),
    (True, True, False),
    (True, True, True),
)


def least_offload(overrides: Sequence[str], machine: Machine) -> list[str]:
    """Overrides: the first of the choices that fits, or where none does, what needs least. Only a rollout on the GPUs
    that train can sleep."""
    if machine.device_bytes is None:
        return []
    apart = load_config(overrides, checked=False).trainer.rollout_gpus is not None
    choices, totals = [], []
    for moments, weights, sleeps in CHOICES:
        if apart and sleeps:
            continue
        choice = [f"{FSDP}.optimizer_offload={moments}".lower(), f"{FSDP}.param_offload={weights}".lower()]
        choice += [f"{ROLLOUT}.enable_sleep_mode=true"] if sleeps else []
        config = load_config([*overrides, *choice], checked=False)
        placement, shape = Placement.of(config, machine.gpus), ModelShape.read(config.model.path)
        choices.append(choice)
        totals.append(memory_plan(config, shape, placement, machine.device).worst().total)
    fitting = [number for number, total in enumerate(totals) if total <= FULL * machine.device_bytes]
    return choices[fitting[0] if fitting else totals.index(min(totals))]
