"""Local models and datasets made on the spot: ``prepare(name, out_dir)`` behind ``vexact prepare NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vexact.data.tasks import is_task
from vexact.prepare.directory import build_directory
from vexact.prepare.random_weights import write_random_model
from vexact.prepare.smollm2 import write_smollm2
from vexact.prepare.task import write_task
from vexact.prepare.tiny import write_tiny, write_tiny_moe, write_tiny_moonlight

Writer = Callable[..., None]  # writer(empty directory, **options)

PREPARERS: dict[str, Writer] = {
    "tiny": write_tiny,
    "tiny_moe": write_tiny_moe,
    "tiny_moonlight": write_tiny_moonlight,
    "smollm2": write_smollm2,
    "random": write_random_model,
    "task": write_task,
}
_COMMON_DEFAULTS: dict[str, Any] = {"arch": None, "seed": 0}  # what the command line passes for every name
_EXAMPLES = {"arch": "qwen3-1.7b", "task": "chain_sum"}


def prepare(name: str, out_dir: str | Path | None = None, **options: Any) -> Path:
    """Make the directory and return it; one that was already made with the same options is returned as it is.

    Args:
        name: ``tiny``, ``tiny_moe`` or ``tiny_moonlight`` (model, tokenizer and data), ``smollm2`` (model), ``random``
            (model; option ``arch``), ``task`` (data; option ``task``) or a ``reasoning_gym:NAME?…`` specification,
            short for ``task``.
        out_dir: where to; a folder of the cache by default.
        options: keyword arguments of the writer, such as ``seed``.

    Raises:
        ValueError: unknown name or option, a missing package, too little disk, or ``out_dir`` holds something else.
    """
    if is_task(name):
        name, options = "task", {"task": name, **options}
    if name not in PREPARERS:
        raise ValueError(f"unknown name {name!r}; use {', '.join(PREPARERS)} or reasoning_gym:NAME")
    writer = PREPARERS[name]
    return build_directory(name, out_dir, writer, _accepted(name, writer, options))


def _accepted(name: str, writer: Writer, options: dict[str, Any]) -> dict[str, Any]:
    """All options of the writer, defaults filled in; a common option at its default is no wish."""
    parameters = {key: item for key, item in inspect.signature(writer).parameters.items() if key != "directory"}
    for key, value in options.items():
        if key not in parameters and (key not in _COMMON_DEFAULTS or value != _COMMON_DEFAULTS[key]):
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{name} has no option {key}={value!r}; its options: {known}")
    wished = {key: item.default for key, item in parameters.items() if item.default is not inspect.Parameter.empty}
    wished |= {key: value for key, value in options.items() if key in parameters and value is not None}
    for key in parameters:
        if key not in wished:
            raise ValueError(f"{name} needs {key}; for example {key}={_EXAMPLES[key]}")
        _check_type(name, key, wished[key], str(parameters[key].annotation))
    return wished


def _check_type(name: str, key: str, value: Any, annotation: str) -> None:
    """What is written on the command line may be a number, a text or anything else that JSON has."""
    if type(value).__name__ != annotation:
        kind = {"int": "a whole number", "str": "text"}[annotation]
        raise ValueError(f"{name}: {key}={value!r} must be {kind}")
