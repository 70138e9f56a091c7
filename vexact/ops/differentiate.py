"""Calls autograd functions, without autograd where no gradient is wanted."""

from __future__ import annotations

from typing import Any

import torch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``. With gradients off only its forward runs: the wrapper takes longer than a launch."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function.apply(*args)
    return function.forward(_NOTHING, *args)  # type: ignore[arg-type]


class _Nothing:
    """A context that keeps nothing."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *outputs: Any) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        pass


_NOTHING = _Nothing()
