"""What is known about a key of verl's, or about all that a pattern matches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """A key whose other values we cannot honour. ``harmless`` values mean what we do anyway."""

    key: str  # a name, or a pattern with * for a subtree
    harmless: tuple[Any, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Unused:
    """A key that has no effect here, and why."""

    key: str
    reason: str
