"""Recipe files: YAML with nested keys, dotted keys or both, in which a text key holds its text as it is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vexact.config.fields import UNSET, ConfigError
from vexact.config.values import takes_text

_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"
_NOT_TEXT = tuple(f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null"))


@dataclass(frozen=True, slots=True)
class Scalar:
    """What YAML takes for a number, a truth value or null, and how it is written."""

    value: Any
    text: str


class _Loader(yaml.SafeLoader):
    """As Hydra reads its files: 1e-6 is a number, a date is text, and a key stands only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and not key.tag.endswith("merge")
        ]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Scalar:
    return Scalar(yaml.SafeLoader.yaml_constructors[node.tag](loader, node), node.value)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
for _tag in _NOT_TEXT:
    _Loader.add_constructor(_tag, _scalar)


def read_recipe(name: str, hints: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and plain values of a recipe file.

    Args:
        name: its path, as given to ``recipe=``.
        hints: the type of every key, by its dotted name.

    Raises:
        ConfigError: not YAML, no mapping, or one key in two places.
    """
    try:
        loaded = yaml.load(Path(os.path.expanduser(name)).read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"recipe={name}: not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = "list" if isinstance(loaded, list) else "single value"
        raise ConfigError(f"recipe={name}: must hold keys such as `trainer:`, it holds a {kind}")
    flat: dict[str, Any] = {}
    for key, value in _keys(loaded, hints):
        if key in flat:
            raise ConfigError(f"recipe={name}: {key} is given twice, nested and with dots; keep one of them")
        flat[key] = _settled(value, takes_text(hints.get(key, UNSET)))
    for key in flat:
        within = next((other for other in flat if key.startswith(f"{other}.")), None)
        if within is not None:
            raise ConfigError(f"recipe={name}: {within} and {key} are both given; keep one of them")
    return flat


def _keys(values: dict[Any, Any], hints: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; the value of a key that takes a mapping is not looked into."""
    for name, value in values.items():
        key = prefix + _name(name)
        if isinstance(value, dict) and value and key not in hints:
            yield from _keys(value, hints, f"{key}.")
        else:
            yield key, value


def _settled(value: Any, as_text: bool) -> Any:
    if isinstance(value, Scalar):
        return value.text if as_text and value.value is not None else value.value
    if isinstance(value, list):
        return [_settled(item, as_text) for item in value]
    if isinstance(value, dict):
        return {_name(name): _settled(item, as_text=False) for name, item in value.items()}
    return value


def _name(key: Any) -> str:
    return key.text if isinstance(key, Scalar) else str(key)
