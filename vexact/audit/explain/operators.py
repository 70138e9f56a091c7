"""Names of the operators a model runs, so that another process can put the same ones in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

from torch import nn

import vexact.ops as invariant
from vexact.models.opset import OpSet

Operators = dict[str, dict[str, str]]


def operators_of(model: nn.Module) -> Operators:
    """Per submodule, the operators that are not the invariant ones, as ``package.module:name``."""
    found: Operators = {}
    for name, ops in _op_sets(model):
        for field in fields(OpSet):
            function = getattr(ops, field.name)
            if function is not getattr(invariant, field.name):
                found.setdefault(name, {})[field.name] = _reference(function)
    return found


def restore_operators(model: nn.Module, recorded: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Puts recorded operators into ``model``; returns those that cannot be imported, each once."""
    lost: dict[str, None] = {}
    for name, ops in _op_sets(model):
        chosen = {}
        for op, reference in recorded.get(name, {}).items():
            function = _resolve(reference)
            if function is None:
                lost[reference] = None
            else:
                chosen[op] = function
        if chosen:
            model.get_submodule(name).__dict__["ops"] = replace(ops, **chosen)
    return list(lost)


def copy_operators(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the very operators of a model of the same modules in this process."""
    for name, ops in _op_sets(source):
        target.get_submodule(name).__dict__["ops"] = ops


def _op_sets(model: nn.Module) -> list[tuple[str, OpSet]]:
    return [(name, m.ops) for name, m in model.named_modules() if isinstance(getattr(m, "ops", None), OpSet)]


def _reference(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"


def _resolve(reference: str) -> Any:
    """The function, or None for one that this package does not define by that name.

    Nothing outside the package is imported: a replay file may come from someone else.
    """
    module, _, name = reference.partition(":")
    if not module.startswith("vexact.ops.") or not name.isidentifier():
        return None
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError:
        return None
