"""Sampling parameters of vLLM that the engine does not honour, and why: as configuration, in Python and as options.

The trainer repeats what decides a log-probability: the logits, the temperature, and the kept set, which travels as one
threshold per token. What shapes logits in another way would make the two sides differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

_SHAPES = "it changes logits in a way that the trainer, which knows temperature and truncation, could not repeat"
# The values at which they do nothing, and the reason why others are refused.
REFUSED_SAMPLING: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "min_tokens": ((None, 0), f"it forbids stop tokens at first, and so {_SHAPES}"),
    "logit_bias": ((None, {}), _SHAPES),
    "repetition_penalty": ((None, 1), _SHAPES),
    "presence_penalty": ((None, 0), _SHAPES),
    "frequency_penalty": ((None, 0), _SHAPES),
    "allowed_token_ids": ((None,), _SHAPES),
    "bad_words": ((None, []), _SHAPES),
}


def check_refused_sampling(given: Mapping[str, Any]) -> None:
    """
    Args:
        given: values of parameters in ``REFUSED_SAMPLING``.

    Raises:
        ValueError: one has a value that would do something.
    """
    for name, value in given.items():
        harmless, reason = REFUSED_SAMPLING[name]
        if not _does_nothing(value, harmless):
            raise ValueError(f"sampling parameter {name}={value!r:.80} is not supported: {reason}; leave it out")


def _does_nothing(value: Any, harmless: tuple[Any, ...]) -> bool:
    if isinstance(value, Mapping) and {} in harmless:  # what is added to logits
        return all(_does_nothing(item, (0,)) for item in value.values())
    if isinstance(value, Sized) and getattr(value, "shape", None) != ():  # a number in an array has no length
        return len(value) == 0 and any(isinstance(item, Sized) for item in harmless)
    return not isinstance(value, bool) and any(value == item for item in harmless)
