"""Copying new weights into the engine's model, by name, refusing anything that does not fit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_weights(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Overwrite every parameter of ``model``. The iterable is consumed one tensor at a time.

    Raises:
        ValueError: lists all unknown, missing, repeated and ill-shaped names and wrong dtypes. Parameters that did fit
            have been overwritten by then.
    """
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    problems: list[str] = []
    for name, tensor in named_tensors:
        parameter = parameters.get(name)
        if parameter is None:
            problems.append(f"unknown name {name!r}")
        elif name not in missing:
            problems.append(f"{name!r} given twice")
        elif tensor.shape != parameter.shape:
            problems.append(f"{name!r} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}")
        elif tensor.dtype != parameter.dtype:
            problems.append(f"{name!r} is {tensor.dtype}, expected {parameter.dtype}")
        else:
            parameter.copy_(tensor)
        missing.discard(name)
    problems += [f"missing {name!r}" for name in sorted(missing)]
    if problems:
        raise ValueError("weight update does not match the model: " + "; ".join(problems))
