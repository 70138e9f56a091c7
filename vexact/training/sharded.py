"""The actor's state as every rank holds it: its own rows of each weight and moment, none gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from vexact.training.optimizer import MOMENTS, Optimizer
from vexact.training.state import ActorState, ParameterState, check_parameters, reshard, unstepped


class StoredTensor(Protocol):
    """A tensor that lies elsewhere, read row by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` on the CPU, in the dtype it was stored in."""
        ...


class StoredState(Protocol):
    """An ``ActorState`` that lies elsewhere; parts are named as in ``ParameterState``."""

    @property
    def num_updates(self) -> int: ...

    @property
    def parameters(self) -> Mapping[str, Mapping[str, StoredTensor | float]]: ...


def sharded_state(model: nn.Module, optimizer: Optimizer, num_updates: int) -> ActorState:
    """The live tensors, not copies: DTensors split by rows where there are several ranks. No rank waits for another."""
    reshard(model)
    parameters: dict[str, ParameterState] = {}
    has_moments = any(optimizer.state_of(parameter) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        state: ParameterState = {"weight": parameter.detach()}
        if has_moments:
            moments = optimizer.state_of(parameter) or unstepped(parameter)
            state["exp_avg"], state["exp_avg_sq"] = (moments[key] for key in MOMENTS)
            state["num_steps"] = float(moments["step"])
        parameters[name] = state
    return {"num_updates": num_updates, "parameters": parameters}


def load_sharded(model: nn.Module, optimizer: Optimizer, stored: StoredState) -> int:
    """Reads this rank's rows of every tensor and returns the number of updates. No rank waits for another.

    Raises ValueError naming what is missing, unexpected, not finite, or not like its parameter; nothing has changed
    then, on this rank.
    """
    reshard(model)
    named = dict(model.named_parameters())
    rows = {name: _Rows(name, parts, named.get(name)) for name, parts in stored.parameters.items()}
    check_parameters({name: local_rows(parameter) for name, parameter in named.items()}, rows)
    optimizer.forget()
    for name, parameter in named.items():
        with torch.no_grad():
            local_rows(parameter).copy_(rows[name]["weight"])
            if "num_steps" in rows[name]:
                moments = {key: torch.empty_like(parameter) for key in MOMENTS}
                for key, moment in moments.items():
                    local_rows(moment).copy_(rows[name][key])
                optimizer.restore(parameter, moments, float(rows[name]["num_steps"]))
    return stored.num_updates


def local_rows(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def row_range(tensor: Tensor) -> tuple[int, int]:
    """First row, and one past the last, that this rank holds; rows are split evenly, the last ranks have fewer or none.

    >>> row_range(torch.zeros(5, 2))
    (0, 5)
    """
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    assert tensor.placements == (Shard(0),), f"split as {tensor.placements}, not by rows over one dimension"
    count, mesh = len(tensor), tensor.device_mesh
    size = math.ceil(count / mesh.size())
    start = min(mesh.get_local_rank() * size, count)
    stop = min(start + size, count)
    assert len(tensor.to_local()) == stop - start
    return start, stop


class _Rows(Mapping[str, Any]):
    """The parts of one stored parameter, each read when it is asked for: this rank's rows only."""

    def __init__(self, name: str, parts: Mapping[str, StoredTensor | float], parameter: nn.Parameter | None) -> None:
        self._name, self._parts, self._parameter = name, parts, parameter

    def __getitem__(self, key: str) -> Any:
        part, parameter = self._parts[key], self._parameter
        if isinstance(part, (int, float)) or parameter is None:
            return part
        if part.shape != parameter.shape:
            raise ValueError(
                f"the checkpoint is of another model: {key} of {self._name} has shape {part.shape}, the model has "
                f"{tuple(parameter.shape)}"
            )
        return part.rows(*row_range(parameter))

    def __contains__(self, key: object) -> bool:
        return key in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
