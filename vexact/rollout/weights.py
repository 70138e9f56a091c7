"""Copying new weights into the engine's model, by name, refusing anything that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vexact.weights.manifest import Fit, TensorSpec


@torch.no_grad()
def copy_weights(parameters: Mapping[str, Tensor], named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Overwrite every parameter of a model. The iterable is consumed one tensor at a time.

    Raises:
        ValueError: lists all unknown, missing, repeated and ill-shaped names and wrong dtypes. Parameters that did fit
            have been overwritten by then.
    """
    fit = Fit(parameters)
    for name, tensor in named_tensors:
        parameter = fit.admit(TensorSpec(name, tuple(tensor.shape), tensor.dtype))
        if parameter is not None:
            parameter.copy_(tensor)
    fit.require_all()
