"""``vexact train`` in which one rank is killed in the midst of a stage.

    torchrun --nproc-per-node=4 -m benchmarks.faults.lose_rank "the update" 3 2 train key=value …

Rank 2 sends itself SIGKILL within the update of step 3. Others are then inside the same collective, or about to be.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from vexact import interrupt
from vexact.cli import main
from vexact.trainer.workers.worker import Worker

STRUCK = "struck at "  # before the time of day, in the output of the rank
STAGES: dict[str, tuple[str, tuple[str, str, str], int]] = {
    "generation": ("generate", ("vexact.rollout.engine", "Engine", "step"), 3),
    "the update": ("update", ("vexact.training.parallel.gradient_sum", "GradientSum", "next_round"), 2),
    "the weight sync": ("sync", ("vexact.weights.transfer", "Outgoing", "cast"), 1),
    "a checkpoint": ("save_shard", ("vexact.trainer.checkpoint.shard_writer", "ShardWriter", "_write"), 2),
}
"""By stage as messages call it: the worker's method, a function that it calls, and the call before which it ends."""


def step_of(method: str, arguments: tuple[Any, ...]) -> int | None:
    """The step that a call of a worker's method belongs to; None for one that belongs to none."""
    if method in ("sync", "save_shard"):
        return int(arguments[0])
    name = arguments[2][0] if method == "generate" else arguments[0][0].sample.request_id
    begin = str(name).split("-")[0].removeprefix("step")
    return int(begin) if begin.isdigit() else None


def arm(stage: str, step: int) -> None:
    """Has this process end itself by SIGKILL in ``stage`` of ``step``."""
    method, (module, owner_name, function), last = STAGES[stage]
    owner = getattr(importlib.import_module(module), owner_name)
    called, inner = getattr(Worker, method), getattr(owner, function)
    calls_left: list[int] = []  # empty outside of the stage

    def strike(self: Any, *args: Any, **kwargs: Any) -> Any:
        if calls_left:
            calls_left[0] -= 1
            if calls_left[0] == 0:
                print(f"{STRUCK}{time.time()}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args, **kwargs)

    def watched(self: Worker, *args: Any, **kwargs: Any) -> Any:
        calls_left[:] = [last] if step_of(method, args) == step else []
        return called(self, *args, **kwargs)

    _put(owner, function, inner, strike)
    _put(Worker, method, called, watched)


def _put(owner: type, name: str, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    setattr(owner, name, functools.wraps(original)(replacement))


if __name__ == "__main__":
    interrupt.install()
    stage, step, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if os.environ.get("RANK") == rank:
        arm(stage, step)
    sys.argv[1:] = sys.argv[4:]
    raise SystemExit(main())
