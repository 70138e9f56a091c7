"""Gives a module another class, made once for each pair of classes. Parameters, names and state dict stay."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn


class Swapped:
    """Marks the classes that were put in the place of others."""


def before(swap: type, original: type) -> type:
    """A class whose ``forward`` is that of ``swap``."""
    return _made((swap, Swapped, original), original)


def below(swap: type, original: type) -> type:
    """A class of ``original`` whose ``super().forward`` is that of ``swap``, a subclass of the same torch class.

    For an ``original`` that *is* the torch class, ``forward`` is that of ``swap``.
    """
    bases = (Swapped, swap) if issubclass(swap, original) else (Swapped, original, swap)
    return _made(bases, original)


_known: dict[tuple[type, ...], type] = {}


def _made(bases: tuple[type, ...], original: type) -> type:
    if bases not in _known:
        _known[bases] = type(f"Invariant{original.__name__}", bases, {"__module__": original.__module__})
    return _known[bases]


def stand_in(module: nn.Module, parameters: dict[str, nn.Parameter], modules: dict[str, nn.Module]) -> nn.Module:
    """A copy of a module with other parameters and children, to try its ``forward`` on small tensors of the CPU."""
    twin = copy.copy(module)
    cast(Any, twin).__dict__ = dict(module.__dict__) | {"_parameters": parameters, "_modules": modules}
    return twin
