"""The actor's state where it is: every rank has its own rows, as torch's distributed checkpoints want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vexact.training.optim.host_memory import host_rows
from vexact.training.optim.optimizer import MOMENTS, Optimizer
from vexact.training.parallel.ranks import Ranks, local
from vexact.training.state.gathered import check_moments, check_tensor, listed, unstepped


def sharded_state(
    model: nn.Module, weights: Sequence[Tensor], optimizer: Optimizer, ranks: Ranks, num_updates: int
) -> dict[str, Tensor]:
    """``weights`` are this rank's rows, of all parameters in order; keys and layout as ``Actor.sharded_state`` says."""
    state = {"num_updates": torch.tensor(num_updates)}
    has_moments = any(optimizer.state_of(parameter) for parameter in model.parameters())
    for (name, parameter), rows in zip(model.named_parameters(), weights, strict=True):
        state[f"weight.{name}"] = _whole(rows, parameter, ranks)
        if has_moments:
            moments = optimizer.state_of(parameter) or unstepped(parameter)
            for key in MOMENTS:
                state[f"{key}.{name}"] = _whole(getattr(moments, key), parameter, ranks)
            state[f"num_steps.{name}"] = torch.tensor(moments.num_steps)
    return state


def blank_state(model: nn.Module, optimizer: Optimizer, ranks: Ranks, moments: bool) -> dict[str, Tensor]:
    """Host memory for ``sharded_state``, to be read into: what is wrong in a file then never touches the actor.

    In few large pieces, which go back to the machine once they are read: malloc keeps what is smaller for later.
    """
    state = {"num_updates": torch.zeros((), dtype=torch.int64)}
    parameters = list(model.parameters())
    weights = host_rows([local(parameter) for parameter in parameters], pinned=False)
    blank = optimizer.blank_moments(parameters) if moments else [()] * len(parameters)
    for (name, parameter), rows, pair in zip(model.named_parameters(), weights, blank, strict=True):
        parts = {"weight": rows}
        if moments:
            parts |= zip(MOMENTS, pair, strict=True)
            state[f"num_steps.{name}"] = torch.zeros((), dtype=torch.int64)
        state |= {f"{key}.{name}": _whole(part, parameter, ranks) for key, part in parts.items()}
    return state


def install_state(model: nn.Module, optimizer: Optimizer, ranks: Ranks, state: Mapping[str, Any]) -> int:
    """Copies a sharded state into model and optimizer, and returns the number of updates. All ranks call it together.

    Raises ValueError naming what is missing, unexpected, not finite, or not like its parameter; nothing has changed
    then. Other ranks raise PeerStopped.
    """
    named = dict(model.named_parameters())
    moments = any(not key.startswith("weight.") and key != "num_updates" for key in state)
    with ranks.together():
        _check(named, state, moments)
    optimizer.forget()
    for name, parameter in named.items():
        with torch.no_grad():
            local(parameter).copy_(local(state[f"weight.{name}"]))
        if moments:
            first, second = (local(state[f"{key}.{name}"]) for key in MOMENTS)
            optimizer.restore(parameter, first, second, int(state[f"num_steps.{name}"]))
    return int(state["num_updates"])


def _whole(rows: Tensor, parameter: Tensor, ranks: Ranks) -> Tensor:
    """As a tensor of all ranks; a lone process has whole ones, sharded or not."""
    return rows if ranks.mesh is None else ranks.sharded(rows, parameter)


def _check(named: Mapping[str, Tensor], state: Mapping[str, Any], moments: bool) -> None:
    parts = ("weight", *MOMENTS, "num_steps") if moments else ("weight",)
    wanted = {"num_updates", *(f"{part}.{name}" for name in named for part in parts)}
    missing, unexpected = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint is of another model: missing {listed(missing)}; unexpected {listed(unexpected)}"
        )
    for name, parameter in named.items():
        for part in parts[:3]:
            tensor = state[f"{part}.{name}"]
            check_tensor(f"{part} of {name}", tensor, parameter)
            if local(tensor).shape != local(parameter).shape:
                spread = "sharded" if isinstance(tensor, DTensor) else "whole"
                raise ValueError(
                    f"{part} of {name} is {spread}: {tuple(local(tensor).shape)} of it are here, the model has "
                    f"{tuple(local(parameter).shape)} here; read it into the tensors of blank_state()"
                )
        if moments:
            check_moments(name, state[f"exp_avg_sq.{name}"], _count(f"num_steps of {name}", state[f"num_steps.{name}"]))
    _count("num_updates", state["num_updates"])


def _count(what: str, value: Any) -> int:
    whole = torch.as_tensor(value)
    if whole.numel() != 1 or whole.dtype != torch.int64 or int(whole) < 0:
        raise ValueError(f"{what} is {value!r}, not a count")
    return int(whole)
