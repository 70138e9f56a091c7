"""As few layers computed again in the backward as there is room to keep the others' activations."""

from __future__ import annotations

from bisect import bisect_left

from vexact.config.memory.advice import MODEL, Machine, with_value
from vexact.config.memory.model_shape import ModelShape
from vexact.config.memory.placement import Placement
from vexact.config.memory.plan import memory_plan
from vexact.config.schema import Config

ROOMY = 0.85  # of a GPU: what is kept only to be faster leaves room for fragments and for an estimate that is off


def with_recomputation(config: Config, shape: ModelShape, machine: Machine) -> Config:
    """The configuration with a number for ``recompute_num_layers=auto``; any other as it is.

    It is the smallest with which an update takes at most ROOMY of what is free, and at most all layers but the last:
    what that one keeps is used before another is computed again, so it takes no more room. Where nothing is known of
    the machine, it is that. All ranks must be given the same: a layer that is computed again asks the experts of
    others again.
    """
    if config.model.recompute_num_layers != "auto":
        return config
    key, most = f"{MODEL}.recompute_num_layers", shape.num_layers - 1
    if machine.device_bytes is None or not config.model.enable_gradient_checkpointing:
        return with_value(config, key, most)  # type: ignore[no-any-return]
    placement, room = Placement.of(config, machine.gpus), ROOMY * machine.device_bytes

    def fits(number: int) -> bool:
        plan = memory_plan(with_value(config, key, number), shape, placement, machine.device, machine.device_bytes)
        return all(stage.total + stage.elastic <= room for stage in plan.stages if stage.stage == "update")

    return with_value(config, key, bisect_left(range(most), True, key=fits))  # type: ignore[no-any-return]
