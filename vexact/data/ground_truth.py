"""What a row's ground truth means to its grader: text that an answer can match, or what the user's function expects."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np

from vexact.data.messages import check_text

GSM8K = "openai/gsm8k"
_GSM8K_NAMES = (GSM8K, "gsm8k")
_GSM8K_NUMBER = re.compile(r"####\s*[-+]?\$?[\d,]*\.?\d+")
# 3/4, 1e5, 12:30, 10-20 and 1 000 are not the numbers 3, 1, 12, 10 and 1
_GOES_ON = re.compile(r"\s*[-+*/^:\u2013\u00d7]\s*\d|[eE][-+]?\d|[._'\u2019 \u00a0\u2009\u202f]\d")


def text_truth(value: Any, data_source: str, where: str) -> str:
    """The ground truth as the text that the built-in graders compare an answer with.

    A number becomes the decimal a model would write: 3.0 is "3", 1e-7 is "0.0000001".

    Args:
        value: as read from the file.
        data_source: the grader's name; GSM8K's wants a number.
        where: file, row and column, for messages.

    Raises:
        ValueError: no answer can match it: null, NaN, infinity, a truth value, a list, a mapping, bytes, blank text.

    >>> text_truth(3.0, "exact_match", "row 0")
    '3'
    """
    if isinstance(value, np.generic):
        value = value.item()
    text = value if isinstance(value, str) else _number_text(value)
    if text is None or not text.strip():
        raise ValueError(
            f"{where}: {_described(value)}, which no answer can match; give the answer as text (or a number), or grade "
            "with your own function in reward.custom_reward_function.path"
        )
    if data_source in _GSM8K_NAMES:
        _check_gsm8k(text, where)
    return check_text(text, where)


def own_truth(value: Any, where: str) -> Any:
    """The ground truth for the user's own reward function: unchanged.

    Raises:
        ValueError: it is NaN or infinite, which is how a missing value looks.
    """
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError(f"{where}: the ground truth is {value}, a missing or overflowed number; mend or drop the row")
    return value


def _number_text(value: Any) -> str | None:
    """Decimal digits of a finite number; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        value = Decimal(repr(value))
    if not isinstance(value, Decimal) or not value.is_finite():
        return None
    return str(int(value)) if value == int(value) else format(value, "f").rstrip("0")


def _described(value: Any) -> str:
    if value is None:
        return "the ground truth is null"
    if isinstance(value, str):
        return f"the ground truth {value!r} is blank"
    if isinstance(value, bool):
        return f"the ground truth is the truth value {value}"
    return f"the ground truth is {type(value).__name__} {value!r:.80}"


def _check_gsm8k(text: str, where: str) -> None:
    numbers = list(_GSM8K_NUMBER.finditer(text if "####" in text else f"#### {text}"))
    if not numbers or _GOES_ON.match(numbers[-1].string, numbers[-1].end()):
        raise ValueError(
            f"{where}: the ground truth {text!r:.80} holds no number that GSM8K's grader reads; it takes '18' and "
            "'… #### 18'"
        )
