"""The whole response must equal the ground truth, apart from white space around it."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """1.0 or 0.0, in ``score`` and in ``acc``."""
    correct = float(solution_str.strip() == str(ground_truth).strip())
    return {"score": correct, "acc": correct}
