"""GSM8K's convention: the answer is the number after the last ``####``."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_FINAL_ANSWER = re.compile(r"####\s*([-+]?)\$?([\d,]*\.?\d+)")


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """1.0 or 0.0; ``ground_truth`` is the number, or a worked answer that ends in ``#### number``.

    Raises:
        ValueError: the ground truth holds no number.
    """
    truth = final_number(str(ground_truth)) if "####" in str(ground_truth) else final_number(f"#### {ground_truth}")
    if truth is None:
        raise ValueError(f"ground_truth={ground_truth!r:.80} holds no number; GSM8K answers are '#### 18' or '18'")
    correct = float(final_number(solution_str) == truth)
    return {"score": correct, "acc": correct}


def final_number(text: str) -> Decimal | None:
    """The number after the last ``####``, without thousands separators and currency.

    >>> final_number("so 1,000 + 234 #### $1,234.0") == 1234
    True
    """
    matches = _FINAL_ANSWER.findall(text)
    if not matches:
        return None
    sign, digits = matches[-1]
    return Decimal(sign + digits.replace(",", ""))
