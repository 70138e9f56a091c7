"""Keys that the schema does not have: verl's, which are dropped or refused with the reason, and those nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vexact.config.checks.verl import here, named_keys, translate
from vexact.config.fields import ConfigError, leaves
from vexact.config.schema import Keys
from vexact.config.spelling import misspelt, nearest


def settle(unknown: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Notices of the keys that are dropped, one for all with the same reason; and what is wrong with the others."""
    problems: list[str] = []
    dropped: dict[str, list[str]] = {}  # by the reason
    for key, value in unknown.items():
        try:
            reason = translate(key, value)
        except KeyError:
            problems.append(_refusal(key, value))
        except ConfigError as error:
            problems.append(str(error))
        else:
            if reason is not None:
                dropped.setdefault(reason, []).append(f"{key}={value}")
    return [_has_no_effect(named, reason) for reason, named in dropped.items()], problems


def _has_no_effect(named: Sequence[str], reason: str) -> str:
    return f"{', '.join(named)} {'has' if len(named) == 1 else 'have'} no effect: {reason}"


def _refusal(key: str, value: Any) -> str:
    ours = [leaf.key for leaf in leaves(Keys)]
    theirs = misspelt(key, ours, named_keys())
    near = nearest(key, ours) if theirs is None else [here(theirs)]
    if not near:
        return f"unknown key {key}; docs/configuration.md lists every key"
    message = f"unknown key {key}; did you mean {' or '.join(near)}?"
    if theirs is None or here(theirs) != theirs:
        return message
    try:
        reason = translate(theirs, value)
    except ConfigError as error:
        return f"{message} {error}"
    return message if reason is None else f"{message} {_has_no_effect([f'{theirs}={value}'], reason)}"
