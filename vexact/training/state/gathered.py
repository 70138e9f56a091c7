"""The actor's state as whole CPU tensors, independent of how many ranks share it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vexact.models.nonfinite import find_nonfinite
from vexact.training.optim.optimizer import MOMENTS, Moments, Optimizer, like
from vexact.training.parallel.ranks import Ranks, local, unsharded


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


def gather_state(model: nn.Module, optimizer: Optimizer, ranks: Ranks, num_updates: int) -> ActorState:
    """Copies everything to the CPU of rank 0, one tensor at a time. All ranks call it together."""
    parameters: dict[str, ParameterState] = {}
    has_moments = any(optimizer.state_of(parameter) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        state: ParameterState = {"weight": _to_cpu(parameter)}
        if has_moments:
            moments = optimizer.state_of(parameter) or unstepped(parameter)
            for key in MOMENTS:
                rows = getattr(moments, key).to(parameter.device)
                state[key] = _to_cpu(ranks.sharded(rows, parameter))  # type: ignore[literal-required]
            state["num_steps"] = float(moments.num_steps)
        if ranks.is_first:
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


def restore_state(model: nn.Module, optimizer: Optimizer, ranks: Ranks, state: ActorState) -> int:
    """Loads rank 0's state into all ranks and returns the number of updates.

    Raises ValueError naming what is missing, unexpected, not finite, or not like its parameter; nothing has changed
    then. Other ranks raise PeerStopped.
    """
    named = dict(model.named_parameters())
    first = ranks.is_first
    with ranks.together():
        if first:
            _check(named, state["parameters"])
    optimizer.forget()
    saved_steps = {name: int(s["num_steps"]) for name, s in state["parameters"].items() if "num_steps" in s}
    num_updates, num_steps = ranks.from_first((state["num_updates"], saved_steps))
    for name, parameter in named.items():
        saved: Any = state["parameters"][name] if first else _placeholders(parameter)
        with torch.no_grad():
            local(parameter).copy_(local(like(saved["weight"], parameter)))
        if num_steps:
            first_moment, second_moment = (local(like(saved[key], parameter)) for key in MOMENTS)
            optimizer.restore(parameter, first_moment, second_moment, num_steps[name])
    return num_updates


def _check(named: dict[str, nn.Parameter], saved: dict[str, ParameterState]) -> None:
    missing, unexpected = sorted(named.keys() - saved.keys()), sorted(saved.keys() - named.keys())
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint is of another model: missing {listed(missing)}; unexpected {listed(unexpected)}"
        )
    moments = any(key in state for state in saved.values() for key in (*MOMENTS, "num_steps"))
    wanted = ("weight", *MOMENTS, "num_steps") if moments else ("weight",)
    for name, parameter in named.items():
        state: Any = saved[name]
        if set(state) != set(wanted):
            lacking, surplus = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
            parts = f"missing {listed(lacking)}; unexpected {listed(surplus)}"
            raise ValueError(f"the state of {name} has other parts than AdamW's: {parts}")
        for key in wanted[:3]:
            check_tensor(f"{key} of {name}", state[key], parameter)
        if moments:
            check_moments(name, state["exp_avg_sq"], state["num_steps"])


def check_tensor(what: str, tensor: Any, parameter: Tensor) -> None:
    """Raises ValueError for anything that is not finite, or no tensor of the parameter's shape and dtype."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{what} is no plain tensor but {_kind(tensor)}")
    if tensor.shape != parameter.shape:
        got, want = tuple(tensor.shape), tuple(parameter.shape)
        raise ValueError(f"the checkpoint is of another model: {what} has shape {got}, the model has {want}")
    if tensor.dtype != parameter.dtype:
        raise ValueError(f"{what} is {tensor.dtype}, the model has {parameter.dtype}; it would be rounded in silence")
    found = find_nonfinite([(what, local(tensor))])
    if found is not None:
        raise ValueError(f"the checkpoint cannot be trained on: {found}; go on from an earlier checkpoint")


def check_moments(name: str, second: Tensor, num_steps: Any) -> None:
    """Raises ValueError for a step count that is none, and for a mean of squares that is negative."""
    if not isinstance(num_steps, (int, float)) or not float(num_steps).is_integer() or num_steps < 0:
        raise ValueError(f"num_steps of {name} is {num_steps!r}, not a number of optimizer steps")
    if bool((local(second) < 0).any()):
        raise ValueError(f"exp_avg_sq of {name} has negative values; a mean of squares has none")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "one on the meta device" if value.is_meta else f"a {str(value.layout).removeprefix('torch.')} one"
    return f"{type(value).__name__} {value!r:.40}"


def unstepped(parameter: Tensor) -> Moments:
    """AdamW's state of a parameter that never had a gradient, as AdamW itself would begin it."""
    zeros = torch.zeros_like(local(parameter))
    return Moments(zeros, zeros)


def listed(names: Iterable[str], limit: int = 3) -> str:
    """Some names as prose."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def _to_cpu(tensor: Tensor) -> Tensor:
    return unsharded(tensor.detach()).to("cpu", copy=True)


def _placeholders(parameter: Tensor) -> dict[str, Tensor]:
    """What a rank other than 0 has of a parameter: tensors of its full shape whose values rank 0's will replace."""
    return dict.fromkeys(("weight", *MOMENTS), torch.empty(parameter.shape, dtype=parameter.dtype))
