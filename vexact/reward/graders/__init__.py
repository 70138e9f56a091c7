"""Built-in graders by data source, each in a module of its own that is imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

_PACKAGE = "vexact.reward.graders"

# Pattern of the data source -> module with compute_score; the first match wins.
GRADERS: dict[str, str] = {
    "exact_match": "exact",
    "vexact/*": "exact",
    "openai/gsm8k": "gsm8k",
    "gsm8k": "gsm8k",
    "reasoning_gym/*": "procedural",
    "lighteval/MATH": "maths",
    "DigitalLearningGmbH/MATH-lighteval": "maths",
    "HuggingFaceH4/MATH-500": "maths",
    "HuggingFaceH4/aime_2024": "maths",
    "math": "maths",
    "math_*": "maths",
    "aime*": "maths",
}


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Grade with the grader of ``data_source``. Raises ValueError for a data source that has none."""
    return grader_for(data_source)(data_source, solution_str, ground_truth, extra_info, **kwargs)


@cache
def grader_for(data_source: str) -> Callable[..., dict[str, float]]:
    """The grader of a data source; imports its module. Raises ValueError for a data source that has none."""
    for pattern, module in GRADERS.items():
        if fnmatchcase(data_source, pattern):
            return importlib.import_module(f"{_PACKAGE}.{module}").compute_score
    raise ValueError(
        f"no grader for data_source={data_source!r}; known: {', '.join(GRADERS)}. Use one of them in the data, "
        "or give your own function in reward.custom_reward_function.path"
    )
