"""How one request is sampled and when it ends; names and defaults are vLLM's."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MIN_TEMPERATURE = 1e-3  # below this logits * (1 / temperature) leaves the range where fp32 still separates tokens


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Validated sampling parameters of one request.

    ``temperature=0`` is greedy. ``top_k <= 0``, ``top_p=1`` and ``min_p=0`` turn a filter off. ``seed=None`` takes the
    engine's. ``stop`` cuts the returned text before the stop string; the token ids keep every sampled token.

    Raises ``ValueError`` naming the parameter, its value and the fix.

    >>> SamplingParams(max_tokens=8, temperature=0.7, stop="\\n").stop
    ('\\n',)
    """

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] | None = None  # a tuple after construction
    stop_token_ids: Iterable[int] | None = None  # a tuple after construction
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._set("n", _integer("n", self.n, low=1, fix="ask for at least one sample"))
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, low=1, fix="allow at least one new token"))
        self._set("top_k", _integer("top_k", self.top_k, low=-1, fix="use -1 or 0 to turn top-k off"))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, low=None, fix="use None for the engine's seed"))
        self._set("temperature", _number("temperature", self.temperature))
        self._set("top_p", _number("top_p", self.top_p))
        self._set("min_p", _number("min_p", self.min_p))
        self._check_ranges()
        self._set("stop", _stop_strings(self.stop))
        ids = () if self.stop_token_ids is None else tuple(self.stop_token_ids)
        fix = "stop_token_ids holds vocabulary indices"
        self._set("stop_token_ids", tuple(_integer("stop_token_ids", i, low=0, fix=fix) for i in ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        if self.temperature != 0 and self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"sampling parameter temperature={self.temperature!r} must be 0 (greedy) or at least {MIN_TEMPERATURE}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling parameter top_p={self.top_p!r} must be in (0, 1]; use 1.0 to turn top-p off")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling parameter min_p={self.min_p!r} must be in [0, 1]; use 0.0 to turn min-p off")


def _integer(name: str, value: Any, *, low: int | None, fix: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"sampling parameter {name}={value!r} must be an integer; {fix}") from None
    if isinstance(value, bool):
        raise ValueError(f"sampling parameter {name}={value!r} must be an integer, not a truth value; {fix}")
    if low is not None and number < low:
        raise ValueError(f"sampling parameter {name}={value!r} must be at least {low}; {fix}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"sampling parameter {name}={value!r} must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"sampling parameter {name}={value!r} must be finite")
    return number


def _stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"sampling parameter stop holds {string!r}; every stop string must be a non-empty string")
    return strings
