"""Typed reading of a JSON object: a value is what its key asks for, or one message names file, key, value and fix."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

REQUIRED: Any = object()
_SHOWN = 60  # characters of a value in a message


class Fields:
    """One object of a file; ``prefix`` is the key it lies under. Every reader raises ValueError."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self.values, self.file, self.prefix = values, file, prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def size(self, key: str, most: int, default: Any = REQUIRED) -> int:
        """A whole number from 1 to ``most``."""
        return self._whole(key, 1, most, default)

    def count(self, key: str, most: int, default: Any = REQUIRED) -> int:
        """A whole number from 0 to ``most``."""
        return self._whole(key, 0, most, default)

    def number(self, key: str, least: float, most: float, default: Any = REQUIRED) -> float:
        """A finite number from ``least`` to ``most``."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            self.refuse(key, f"must be a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = REQUIRED) -> str:
        value = self._get(key, default)
        if value not in allowed:
            self.refuse(key, f"is not supported; supported: {', '.join(allowed)}")
        return str(value)

    def object(self, key: str) -> Fields:
        """The object under a key; an empty one if there is none or it is null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "must be an object {…}")
        return Fields(value or {}, self.file, f"{self.prefix}{key}.")

    def row(self, key: str, num_rows: int) -> int | None:
        """An index into rows, negative ones counted from the end as Python does; None where there is none."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not -num_rows <= value < num_rows:
            self.refuse(key, f"must be a token id from 0 to {num_rows - 1} (vocab_size - 1), or null")
        return value % num_rows

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """An id, a list of ids, or null for none."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                self.refuse(key, f"must be a token id from 0 to {vocab_size - 1} (vocab_size - 1), or a list of them")
        return tuple(ids)

    def refuse(self, key: str, must: str) -> NoReturn:
        """Raises ValueError: ``must`` says what is wrong with the value, or what it has to be."""
        if key not in self.values:
            raise ValueError(f"{self.file}: {self.prefix}{key} is missing; it {must}")
        try:
            text = json.dumps(self.values[key])
        except (TypeError, ValueError):  # a dictionary made by hand, or a number of thousands of digits
            text = f"a {type(self.values[key]).__name__}"
        text = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
        raise ValueError(f"{self.file}: {self.prefix}{key}={text} {must}")

    def _whole(self, key: str, least: int, most: int, default: Any) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.refuse(key, f"must be a whole number from {least} to {most}")
        return value

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.values and default is REQUIRED:
            raise ValueError(f"{self.file}: {self.prefix}{key} is missing; copy config.json of the original checkpoint")
        return self.values.get(key, default)


def is_number(value: object) -> bool:
    """Finite, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
