"""How a configuration key is declared (`opt`, `section`) and how plain YAML values become typed sections (`build`)."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Container, Mapping
from functools import cache
from typing import Any, Literal

from vexact.config.spelling import typographic

UNSET: Any = object()
LARGEST = 2**31 - 1  # of a whole number, where its key says nothing else: counts and ids fill 32 bits in the kernels
LARGEST_64 = 2**63 - 1
LARGEST_FLOAT = 3.4e38  # a larger number is infinite in float32
_SIGNS = {"ge": ">=", "gt": ">", "lt": "<", "le": "<="}
_COMPARE = {"ge": operator.ge, "gt": operator.gt, "lt": operator.lt, "le": operator.le}


class ConfigError(ValueError):
    """The user's configuration is wrong; the message names the key, the value and the fix."""


def opt(
    default: Any,
    help: str,
    *,
    verl: Any = UNSET,
    ge: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    infinite: bool = False,
    why: str = "",
    refused: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Any:
    """Declare one key.

    Args:
        default: its value when nobody sets it.
        help: one sentence for the documentation, with the unit.
        verl: verl's default where it differs from ours.
        ge, gt, lt, le: the range a number, or every number of a list, must lie in. NaN never does.
        infinite: whether infinity is a value like others.
        why: why the range ends where it does, when that is not obvious.
        refused: values that verl knows and we cannot honour, each with the reason.
        aliases: other spellings of a value.
    """
    metadata = {
        "help": help,
        "verl": verl,
        "range": {"ge": ge, "gt": gt, "lt": lt, "le": le},
        "infinite": infinite,
        "why": why,
        "refused": dict(refused or {}),
        "aliases": dict(aliases or {}),
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, help: str) -> Any:
    """Declare a nested section."""
    return dataclasses.field(default_factory=kind, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One key of the schema, flattened: what the documentation and the spelling help iterate over."""

    key: str  # dotted, e.g. "data.train_files"
    hint: Any
    default: Any
    metadata: Mapping[str, Any]


@cache
def leaves(kind: type, prefix: str = "") -> tuple[Leaf, ...]:
    """Every key below a section, in declaration order."""
    hints, defaults = _types(kind), kind()
    found: list[Leaf] = []
    for item in dataclasses.fields(kind):
        key = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(hints[item.name]):
            found += leaves(hints[item.name], f"{key}.")
        else:
            found.append(Leaf(key, hints[item.name], getattr(defaults, item.name), item.metadata))
    return tuple(found)


@cache
def _types(kind: type) -> Mapping[str, Any]:
    """The type of every field; Python evaluates its text anew each time that it is asked."""
    return typing.get_type_hints(kind)


def build(kind: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """A section from a nested mapping whose keys are all known.

    Raises:
        ConfigError: a value has the wrong type or lies outside its range.
    """
    hints = _types(kind)
    arguments = {}
    for item in dataclasses.fields(kind):
        if item.name not in values:
            continue
        key, value, hint = f"{prefix}{item.name}", values[item.name], hints[item.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key}={value!r}: {key} is a section; set one of its keys, such as {_first_key(hint, key)}"
                )
            arguments[item.name] = build(typing.cast(type, hint), value, f"{key}.")
        else:
            arguments[item.name] = _checked(key, value, hint, item.metadata)
    return kind(**arguments)


def unknown_keys(kind: type, values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names in ``values`` that the schema does not have (a wholly unknown subtree is named by its leaves)."""
    hints = _types(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    found = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in known:
            found += list(flatten({key: value}))
        elif dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping):
            found += unknown_keys(typing.cast(type, hints[name]), value, f"{key}.")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "", whole: Container[str] = ()) -> dict[str, Any]:
    """Nested mapping to dotted names; an empty mapping is a leaf, and so is the one of a key in ``whole``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            flat |= flatten(value, f"{key}.", whole)
        else:
            flat[key] = value
    return flat


def type_name(hint: Any) -> str:
    """A type as documentation and messages call it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in arguments)
    if origin is Literal:
        return " | ".join(str(part) for part in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        dict: "mapping",
    }
    return names[origin or hint]


def _checked(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    value = [_spelt(key, item, metadata) for item in value] if _is_list(value) else _spelt(key, value, metadata)
    converted = convert(value, hint)
    if converted is UNSET:
        raise ConfigError(f"{key}={value!r}: expected {type_name(hint)}{_example(key, hint)}{typographic(value)}")
    for number in converted if isinstance(converted, tuple) else (converted,):
        _check_range(key, converted, number, metadata)
    return converted


def _spelt(key: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    """The value under our spelling."""
    if not isinstance(value, str):
        return value
    if value in metadata["refused"]:
        raise ConfigError(f"{key}={value}: not supported: {metadata['refused'][value]}")
    return metadata["aliases"].get(value, value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def convert(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``, or UNSET. Only lossless conversions: 8.0 is a whole number, "8" and True are not.

    A number is no text either: how it was written is lost.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        candidates = (convert(value, part) for part in arguments)
        return next((item for item in candidates if item is not UNSET), UNSET)
    if origin is Literal:
        return value if value in arguments and not isinstance(value, bool) else UNSET
    if origin is tuple:
        items = [convert(item, arguments[0]) for item in (value if _is_list(value) else [value])]
        return UNSET if UNSET in items else tuple(items)
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) else UNSET
    return _scalar(value, hint)


def _scalar(value: Any, hint: Any) -> Any:
    if hint is type(None):
        return None if value is None else UNSET
    if hint is bool:
        return value if isinstance(value, bool) else UNSET
    if isinstance(value, bool) or value is None:
        return UNSET
    if hint is int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else UNSET
    if hint is float:
        return _float(value) if isinstance(value, (int, float)) else UNSET
    return value if isinstance(value, str) else UNSET


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_range(key: str, value: Any, number: Any, metadata: Mapping[str, Any]) -> None:
    """``number`` is the value or an item of it."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return
    bounds, why = dict(metadata["range"]), metadata["why"]
    if isinstance(number, int) and bounds["le"] is None:
        bounds["le"] = LARGEST
    if isinstance(number, float) and not abs(number) <= LARGEST_FLOAT and not (number > 0 and metadata["infinite"]):
        raise ConfigError(f"{key}={_listed(value)!r}: must be a finite number of float32")
    if not all(bound is None or _COMPARE[name](number, bound) for name, bound in bounds.items()):
        raise ConfigError(f"{key}={_listed(value)!r}: must be {describe_range(bounds)}{f' ({why})' if why else ''}")


def _listed(value: Any) -> Any:
    """A list as it is written."""
    return list(value) if isinstance(value, tuple) else value


def describe_range(bounds: Mapping[str, float | None]) -> str:
    """``{"ge": 0, "le": 1}`` to ``">= 0 and <= 1"``."""
    if bounds["ge"] is not None and bounds["ge"] == bounds["le"]:
        return f"{bounds['ge']:g}"
    return " and ".join(f"{_SIGNS[name]} {_bound(bound)}" for name, bound in bounds.items() if bound is not None)


def _bound(bound: float) -> str:
    powers: dict[float, str] = {LARGEST: "2^31 - 1", LARGEST_64: "2^63 - 1"}
    return powers.get(bound) or f"{bound:g}"


def _example(key: str, hint: Any) -> str:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    examples = {int: "8", float: "0.5", bool: "true", str: "name"}
    for part in parts:
        if part in examples:
            return f", e.g. {key}={examples[part]}"
        if typing.get_origin(part) is tuple:
            return f", e.g. '{key}=[1,2]'" if typing.get_args(part)[0] in (int, float) else f", e.g. '{key}=[a,b]'"
    return ""


def _first_key(kind: Any, key: str) -> str:
    return leaves(kind, f"{key}.")[0].key
