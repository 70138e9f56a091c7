"""How one request is sampled and when it ends; names and defaults are vLLM's."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from numbers import Integral, Real
from typing import Any

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING, check_refused_sampling
from vexact.config.checks.seed import check_seed
from vexact.rollout.requests.stop_strings import INCOMPLETE

MIN_TEMPERATURE = 1e-3  # below this logits * (1 / temperature) leaves the range where fp32 still separates tokens
MAX_TEMPERATURE = 1e6  # above this fp32 no longer separates the probabilities of logits that are less than 0.1 apart
MAX_SAMPLES = 2**16  # of one prompt
MIN_TOP_P = 2.0**-126  # fp32 has no smaller number that every device takes for one; it keeps the largest logits alone
MAX_TOP_K = 2**31 - 1  # what a step's arrays hold; no vocabulary is larger, so that more keeps no more


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Validated sampling parameters of one request.

    ``temperature=0`` is greedy. ``top_k <= 0``, ``top_p=1`` and ``min_p=0`` turn a filter off. ``seed=None`` takes the
    engine's. ``stop`` cuts the returned text before the stop string; the token ids keep every sampled token.
    ``prompt_logprobs=0`` has samples carry the log-probabilities of their prompt (``Sample.prompt_logprobs``). The last
    seven are vLLM's, in the order of ``config/checks/refused_sampling.py``: values that would do something are refused.

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
    prompt_logprobs: int | None = None
    min_tokens: InitVar[Any] = None
    logit_bias: InitVar[Any] = None
    repetition_penalty: InitVar[Any] = None
    presence_penalty: InitVar[Any] = None
    frequency_penalty: InitVar[Any] = None
    allowed_token_ids: InitVar[Any] = None
    bad_words: InitVar[Any] = None

    def __post_init__(self, *refused: Any) -> None:
        check_refused_sampling(dict(zip(REFUSED_SAMPLING, refused, strict=True)))
        self._set("n", _integer("n", self.n, low=1, fix="ask for at least one sample"))
        if self.n > MAX_SAMPLES:
            raise ValueError(f"sampling parameter n={self.n!r:.80} must be at most {MAX_SAMPLES} samples of one prompt")
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, low=1, fix="allow at least one new token"))
        top_k = _integer("top_k", self.top_k, low=-1, fix="use -1 or 0 to turn top-k off")
        self._set("top_k", min(top_k, MAX_TOP_K))
        if self.seed is not None:
            self._set("seed", check_seed("sampling parameter seed", self.seed))
        self._set("temperature", _number("temperature", self.temperature))
        self._set("top_p", _number("top_p", self.top_p))
        self._set("min_p", _number("min_p", self.min_p))
        self._check_ranges()
        self._set("top_p", max(self.top_p, MIN_TOP_P))
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"sampling parameter ignore_eos={self.ignore_eos!r:.80} must be True or False")
        asked = self.prompt_logprobs
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, Integral) or asked != 0):
            raise ValueError(
                f"sampling parameter prompt_logprobs={asked!r:.80} must be None or 0: the engine gives the exact "
                "log-probability of a prompt's own tokens and no alternatives"
            )
        self._set("prompt_logprobs", None if asked is None else 0)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self) -> None:
        if self.temperature != 0 and self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"sampling parameter temperature={self.temperature!r} must be 0 (greedy) or at least {MIN_TEMPERATURE}"
            )
        if self.temperature > MAX_TEMPERATURE:
            raise ValueError(
                f"sampling parameter temperature={self.temperature!r:.80} must be at most {MAX_TEMPERATURE:g}; "
                "samples are uniform long before"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling parameter top_p={self.top_p!r} must be in (0, 1]; use 1.0 to turn top-p off")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling parameter min_p={self.min_p!r} must be in [0, 1]; use 0.0 to turn min-p off")


def _integer(name: str, value: Any, *, low: int, fix: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"sampling parameter {name}={value!r:.80} must be an integer; {fix}") from None
    if isinstance(value, bool):
        raise ValueError(f"sampling parameter {name}={value!r:.80} must be an integer, not a truth value; {fix}")
    if number < low:
        raise ValueError(f"sampling parameter {name}={value!r:.80} must be at least {low}; {fix}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"sampling parameter {name}={value!r:.80} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"sampling parameter {name}={value!r:.40} must be finite")
    return number


def _stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _items("stop", stop, "a string or a list of strings")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(
                f"sampling parameter stop holds {string!r:.80}; every stop string must be a non-empty string"
            )
        if INCOMPLETE in string or not is_unicode(string):
            raise ValueError(
                f"sampling parameter stop holds {string!r:.80}, which no response can contain: U+FFFD and lone "
                "surrogates stand for bytes that are no character"
            )
    return strings


def _stop_token_ids(ids: Iterable[int] | None) -> tuple[int, ...]:
    fix = "stop_token_ids holds vocabulary indices"
    return tuple(
        _integer("stop_token_ids", index, low=0, fix=fix)
        for index in _items("stop_token_ids", ids, "a list of vocabulary indices")
    )


def _items(name: str, value: Iterable[Any] | None, what: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValueError(f"sampling parameter {name}={value!r:.80} must be {what}")
    return tuple(value)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
