"""What becomes of a key that the schema does not have."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from vexact.config.checks.verl.entry import Refused, Unused
from vexact.config.checks.verl.moved import MOVED
from vexact.config.checks.verl.refused import REFUSED
from vexact.config.checks.verl.unused import UNUSED
from vexact.config.fields import ConfigError

_ENTRIES: tuple[Refused | Unused, ...] = (*REFUSED, *UNUSED)


def named_keys() -> list[str]:
    """The keys of all tables, without those of whole subtrees."""
    return [*(entry.key for entry in _ENTRIES if "*" not in entry.key), *MOVED]


def translate(key: str, value: Any) -> str | None:
    """Why a key that neither the schema has nor ``MOVED`` has no effect; None when there is nothing to say.

    Raises:
        ConfigError: verl honours this value and we cannot.
        KeyError: neither verl nor we know the key.
    """
    entry = next((entry for entry in _ENTRIES if entry.key == key), None)
    entry = entry or next((entry for entry in _ENTRIES if fnmatchcase(key, entry.key)), None)
    if entry is None:
        raise KeyError(key)
    if isinstance(entry, Unused):
        return entry.reason
    _require_harmless(entry, key, value)
    return None


def _require_harmless(refused: Refused, key: str, value: Any) -> None:
    # True == 1 in Python, but a size of True is not a size of 1
    if any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in refused.harmless):
        return
    accepted = " or ".join("null" if item is None else str(item).lower() for item in refused.harmless)
    fix = f"remove it or set {key}={accepted}" if accepted else "remove it"
    raise ConfigError(f"{key}={value}: not supported: {refused.reason}; {fix}")
