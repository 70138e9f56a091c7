"""A process that fails on cue: in the n-th call of a function, at one version of the weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vexact.config import Config
from vexact.distributed import RankInfo, versions
from vexact.distributed.on_torchrun.driver import TorchrunChannel
from vexact.distributed.remote import Arrival, RemoteGroup
from vexact.models.opset import set_ops
from vexact.ops import stock
from vexact.rollout import Engine
from vexact.trainer.workers import build
from vexact.trainer.workers.roles import Roles
from vexact.trainer.workers.worker import Worker

STAGES = {
    "generation": ("vexact.rollout.engine", "Engine", "step"),
    "the update": ("vexact.training.optim.optimizer", "Optimizer", "_apply"),  # all gradients are there
    "the weight sync": ("vexact.weights.transfer", "Incoming", "put_slots"),
    "a checkpoint": ("vexact.trainer.checkpoint.shard_writer", "ShardWriter", "_go_on"),  # between pieces of a file
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong.

    Attributes:
        stage: a key of ``STAGES``.
        kind: the name of a signal to the own process, ``memory`` for an error of want of it, ``weight`` or ``norm``
            for an engine of which one weight or the norm is another from then on, or ``torch`` for another version of
            it, whatever the stage.
        version: of the weights that the rollout has then.
        call: which call of the stage's function since that version came, from 1.
        rank: on which.
        is_hidden: rank 0 gets torchrun's signal in the moment in which it hears of the death.
    """

    stage: str
    kind: str
    version: int = 1
    call: int = 3
    rank: int = 1
    is_hidden: bool = False

    def plant(self) -> None:
        """Puts the fault into this process."""
        if self.kind == "torch":
            versions._installed = {"torch": "2.0.0"}.get
        module, owner_name, name = STAGES[self.stage]
        owner = getattr(importlib.import_module(module), owner_name)
        strike_in(self, owner, name, _noted_versions())

    def strike(self, owner: Any) -> None:
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. " + "More. " * 60)
        if self.kind == "weight":
            with torch.no_grad():
                next(owner.model.parameters()).mul_(1.01)
        elif self.kind == "norm":
            set_ops(owner.model, dataclasses.replace(owner.model.ops, rms_norm=stock.rms_norm))
        else:
            os.kill(os.getpid(), signal.Signals[self.kind])


def strike_in(fault: Fault, owner: Any, name: str, versions: list[int]) -> None:
    """Has a method strike at the fault's call; ``versions`` are those that have come so far."""
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += versions[-1:] == [fault.version]
        if calls[0] == fault.call:
            calls[0] += 1
            fault.strike(self)
        return original(self, *args, **kwargs)

    setattr(owner, name, faulty)


def _noted_versions() -> list[int]:
    """Versions of the weights that the engine of this process has got, as they come."""
    versions: list[int] = []
    original = Engine.replacing_weights

    @contextmanager
    def noting(self: Engine, version: int) -> Iterator[Any]:
        with original(self, version) as parameters:
            yield parameters
        versions.append(version)

    Engine.replacing_weights = noting  # type: ignore[method-assign]
    return versions


def find_stopped_ranks_late() -> None:
    """Has the deadline of a call pass for the driver of this process as soon as one of its ranks is stopped. A deadline
    short enough for a test would pass for ranks that are only slow."""
    original = RemoteGroup._look

    def looking(self: RemoteGroup, wait_s: float = 0.0) -> None:
        if any(_is_stopped(info.pid) for info in self.infos):
            for opened in self._open.values():
                opened.deadline = -math.inf
        original(self, wait_s)

    RemoteGroup._look = looking  # type: ignore[method-assign]


def hide_deaths() -> None:
    """Has SIGTERM come to this process, rank 0 of torchrun, when it has taken the news of a death from its queue and
    nobody has them yet."""
    original = TorchrunChannel.receive

    def receiving(self: TorchrunChannel, timeout_s: float) -> list[Arrival]:
        arrivals = original(self, timeout_s)
        if any(arrival.failure is not None and arrival.failure.kind == "died" for arrival in arrivals):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):  # bytecodes, for the handler to run
                pass
        return arrivals

    TorchrunChannel.receive = receiving  # type: ignore[method-assign]


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def make(fault: Fault, config: Config, roles: Roles, total_steps: int, info: RankInfo) -> Worker:
    """The factory of a run with a fault, for processes that Ray starts: they import it from here."""
    if info.rank == fault.rank:
        fault.plant()
    return Worker(config, roles, total_steps, info)


def plant_in_workers(fault: Fault) -> None:
    """Has the groups of this process start workers with the fault."""
    build._worker = functools.partial(make, fault)
