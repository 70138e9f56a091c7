"""The actor's state as whole CPU tensors, independent of how many ranks share it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vexact.models.nonfinite import find_nonfinite
from vexact.training.optimizer import MOMENTS, Optimizer, like, unsharded

T = TypeVar("T")


class ParameterState(TypedDict, total=False):
    """One parameter and, after the first optimizer step, AdamW's moments. All fp32 unless the master copy is not."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    num_steps: float


class ActorState(TypedDict):
    """No random state: data order and sampling are pure functions of seeds and counters."""

    num_updates: int
    parameters: dict[str, ParameterState]  # empty on ranks other than 0


def gather_state(model: nn.Module, optimizer: Optimizer, num_updates: int) -> ActorState:
    """Copies everything to the CPU of rank 0, one tensor at a time. All ranks call it together."""
    parameters: dict[str, ParameterState] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state_of(parameter)
        state: ParameterState = {"weight": _to_cpu(parameter)}
        if moments:
            state["exp_avg"], state["exp_avg_sq"] = (_to_cpu(moments[key]) for key in MOMENTS)
            state["num_steps"] = float(moments["step"])
        if _is_first_rank():
            parameters[name] = state
    return {"num_updates": num_updates, "parameters": parameters}


def nonfinite_in(state: ActorState) -> str | None:
    """Names the first weight, moment or step count of a gathered state that is NaN or infinite; None when all is well.

    Such a state must never take the place of a healthy checkpoint.
    """
    return find_nonfinite(
        (name if key == "weight" else f"{key} of {name}", torch.as_tensor(value))
        for name, saved in state["parameters"].items()
        for key, value in saved.items()
    )


def restore_state(model: nn.Module, optimizer: Optimizer, state: ActorState) -> int:
    """Loads rank 0's state into all ranks and returns the number of updates.

    Raises ValueError naming missing, unexpected, misshapen or non-finite parameters.
    """
    named = dict(model.named_parameters())
    if _is_first_rank():
        _check(named, state["parameters"])
        found = nonfinite_in(state)
        if found is not None:
            raise ValueError(f"the checkpoint cannot be trained on: {found}; resume from an earlier one")
    optimizer.forget()
    has_moments = _from_first_rank(any("exp_avg" in s for s in state["parameters"].values()))
    for name, parameter in named.items():
        saved = state["parameters"].get(name, {})
        with torch.no_grad():
            parameter.copy_(like(saved.get("weight", _placeholder(parameter)), parameter))
        if has_moments:
            first, second = saved.get("exp_avg"), saved.get("exp_avg_sq")
            moments = {
                key: _placeholder(parameter) if moment is None else moment
                for key, moment in zip(MOMENTS, (first, second), strict=True)
            }
            optimizer.restore(parameter, moments, _from_first_rank(saved.get("num_steps", 0.0)))
    return _from_first_rank(state["num_updates"])


def _check(named: dict[str, nn.Parameter], saved: dict[str, ParameterState]) -> None:
    missing, unexpected = sorted(named.keys() - saved.keys()), sorted(saved.keys() - named.keys())
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint is of another model: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for name, parameter in named.items():
        if saved[name]["weight"].shape != parameter.shape:
            got, want = tuple(saved[name]["weight"].shape), tuple(parameter.shape)
            raise ValueError(f"the checkpoint is of another model: {name} has shape {got}, the model has {want}")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _to_cpu(tensor: Tensor) -> Tensor:
    return unsharded(tensor.detach()).to("cpu", copy=True)


def _placeholder(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's full shape whose values rank 0 will replace."""
    return torch.empty(parameter.shape, dtype=parameter.dtype)


def _is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_first_rank(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
