"""Seconds of an update's stages: weights come, micro-batches one by one, the optimizer, weights go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from vexact.training import Actor


def stages(actor: Actor, update: Callable[[], Any]) -> dict[str, Any]:
    """Runs ``update()`` of the actor once and waits for the device between its stages, so that all of it takes a bit
    longer: ``before_s``, ``micro_batches_s`` (a list), ``after_s`` (what is compared and counted), ``optimizer_s``,
    ``end_s``."""
    marks: list[tuple[str, float]] = []

    def mark(name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append((name, time.perf_counter()))

    gradients, optimizer = actor.gradients, actor.optimizer
    next_round, accumulate, step = gradients.next_round, actor._accumulate, optimizer.step

    def marked_round() -> None:
        mark("micro_batch")
        next_round()

    def marked_accumulate(*arguments: Any) -> Any:
        result = accumulate(*arguments)
        mark("after")
        return result

    def marked_step(max_norm: float) -> float:
        mark("optimizer")
        norm = step(max_norm)
        mark("end")
        return norm

    patched: tuple[tuple[Any, str, Any], ...] = (
        (gradients, "next_round", marked_round),
        (actor, "_accumulate", marked_accumulate),
        (optimizer, "step", marked_step),
    )
    try:
        for owner, name, function in patched:
            setattr(owner, name, function)
        mark("before")
        update()
        mark("")
    finally:
        for owner, name, _ in patched:
            delattr(owner, name)
    seconds: dict[str, list[float]] = {}
    for (name, start), (_, stop) in itertools.pairwise(marks):
        seconds.setdefault(name, []).append(round(stop - start, 4))
    last = seconds.pop("after")[-1]
    return {
        "before_s": seconds["before"][0],
        "micro_batches_s": seconds["micro_batch"],
        "after_s": last,
        "optimizer_s": seconds["optimizer"][0],
        "end_s": seconds["end"][0],
    }
