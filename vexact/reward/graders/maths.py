"""Mathematical equivalence by math-verify: boxed answers, LaTeX, fractions, sets, intervals."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

try:
    from math_verify import parse, verify
except ImportError as missing:
    raise ImportError("grading mathematics needs the package math-verify: pip install 'vexact[tasks]'") from missing

from vexact.reward.graders.gate import evaluation_gate


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """1.0 or 0.0, in ``score`` and in ``acc``.

    math-verify's own limits are off: they use signals, which fail off the main thread, and the pool has a deadline.

    Raises:
        ValueError: the ground truth cannot be parsed.
    """
    _expect_no_limits()
    truth = str(ground_truth)
    with evaluation_gate():
        gold = parse(truth if "\\boxed" in truth else f"\\boxed{{{truth}}}", parsing_timeout=None)
        if not gold:
            raise ValueError(f"ground_truth={truth!r:.80} is not mathematics that math-verify can parse")
        answer = parse(solution_str, parsing_timeout=None)
        correct = float(verify(gold, answer, timeout_seconds=None))
    return {"score": correct, "acc": correct}


@cache
def _expect_no_limits() -> None:
    """The library warns about every switched-off limit."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
