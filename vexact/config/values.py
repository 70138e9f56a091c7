"""The value behind ``key=`` on a command line: text keys take their text as it stands, all others Hydra's grammar."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal

from vexact.config.fields import ConfigError

_QUOTED = re.compile(r"""\s*('(\\.|[^'\\])*'|"(\\.|[^"\\])*")\s*""", re.DOTALL)
_PLAIN = frozenset((bool, int, float))
_REFERENCE = re.compile(r"\$\{(oc\.env:[^{}]*|[A-Za-z_][\w.]*)\}")


def parse(key: str, text: str, hint: Any) -> Any:
    """The value of ``key=text`` for a key of the type ``hint`` (UNSET for a key that the schema does not have).

    A text key takes ``text`` as it is, whatever it looks like, less one pair of quotes around all of it. ``null`` and
    nothing at all are None where the key may be null. ``[a,b]`` is a list where the key takes one, as are a single
    value and nothing at all.

    Raises:
        ConfigError: brackets or quotes do not match, a list has an empty item, or there are several values.
    """
    parts = _parts(hint)
    if type(None) in parts:
        if text.strip().lower() in ("", "null"):
            return None
        if text.strip() == "None" and str in parts:
            raise ConfigError(f"{key}={text}: nothing is written null here; as a text write {key}='\"None\"'")
    for part in parts:
        if _is_text(part):
            return _unquoted(text)
        if typing.get_origin(part) is tuple:
            return _list(key, text, typing.get_args(part)[0])
    return _in_grammar(key, text)


def takes_text(hint: Any) -> bool:
    """Whether a key of the type takes text, or a list of texts: any text, or one of a choice."""
    return any(
        _is_text(typing.get_args(part)[0] if typing.get_origin(part) is tuple else part) for part in _parts(hint)
    )


def is_literal(value: Any) -> bool:
    """Whether a text (or a list with such a text) has ``${`` in it that is no reference to a key or a variable."""
    if isinstance(value, (list, tuple)):
        return any(is_literal(item) for item in value)
    return isinstance(value, str) and "${" in _REFERENCE.sub("", value)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union, less a choice beside truth values or numbers: Hydra's grammar reads all of them."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if _PLAIN.isdisjoint(parts):
        return parts
    return tuple(part for part in parts if typing.get_origin(part) is not Literal)


def _is_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is Literal


def _unquoted(text: str) -> str:
    """The text without one pair of quotes around it, read as Hydra reads it: only quotes are escaped."""
    if _QUOTED.fullmatch(text) is None:
        return text
    quote = text.strip()[0]
    return text.strip()[1:-1].replace(f"\\{quote}", quote)


def _list(key: str, text: str, item_hint: Any) -> Any:
    stripped = text.strip()
    if not stripped:
        return []
    if stripped.lower() in ("null", "none"):
        raise ConfigError(f"{key}={text}: an empty list is written '{key}=[]', and this text as an item ['{stripped}']")
    if stripped.startswith("[") and stripped.endswith("]"):
        items = _items(key, text, stripped[1:-1])
        return [_unquoted(item) if _is_text(item_hint) else _in_grammar(key, item) for item in items]
    if stripped.startswith("[") and "]" not in stripped:
        raise _unbalanced(key, text)
    return _unquoted(text) if item_hint is str else _in_grammar(key, text)


def _items(key: str, text: str, body: str) -> list[str]:
    """The texts between the commas; a comma in quotes or brackets separates nothing, and the last one may be spare."""
    items, start, depth, quote = [], 0, 0, ""
    for index, char in enumerate(body):
        if quote:
            quote = "" if char == quote and body[index - 1] != "\\" else quote
        elif char in "'\"" and not body[start:index].strip():
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth = max(0, depth - 1)
        elif char == "," and depth == 0:
            items.append(body[start:index].strip())
            start = index + 1
    if quote or depth:
        raise _unbalanced(key, text)
    if body[start:].strip():
        items.append(body[start:].strip())
    if "" in items:
        raise ConfigError(f"{key}={text}: item {items.index('') + 1} is empty; remove a comma, or write '' for no text")
    return items


def _in_grammar(key: str, text: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"value={text}")
    except HydraException as error:
        if text[:1] in tuple("[{'\""):
            raise _unbalanced(key, text) from error
        return text
    if parsed.is_sweep_override():
        raise ConfigError(f"{key}={text}: several values; write a list as '{key}=[{text}]'")
    return parsed.value()


def _unbalanced(key: str, text: str) -> ConfigError:
    return ConfigError(
        f"{key}={text}: unbalanced brackets or quotes; quote the argument in the shell, e.g. '{key}=[a,b]', and "
        f"an item that holds one of them again, e.g. '{key}=[\"a]\",b]'"
    )
