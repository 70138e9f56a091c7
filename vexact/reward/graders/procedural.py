"""reasoning-gym answers, graded by the task's own scorer (which may give partial credit)."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

try:
    import reasoning_gym
except ImportError as missing:
    raise ImportError("reasoning-gym tasks need the package reasoning-gym: pip install 'vexact[tasks]'") from missing

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """``score`` is the task's own score in 0..1; ``acc`` is 1.0 only for full marks.

    The answer is the text between the last ``<answer>`` tags, or the whole response when there are none.

    Raises:
        ValueError: the row does not carry its task entry.
    """
    if not extra_info or "entry" not in extra_info:
        raise ValueError(
            f"rows of {data_source!r} need extra_info.entry; make them with the data source "
            "'reasoning_gym:NAME' or with 'vexact prepare task NAME'"
        )
    task = _task(data_source.partition("/")[2], extra_info.get("task_settings") or "{}")
    tagged = _TAGGED.findall(solution_str)
    answer = (tagged[-1] if tagged else solution_str).strip()
    score = float(task.score_answer(answer=answer, entry=_decode(extra_info["entry"])))
    return {"score": score, "acc": float(score >= 1.0)}


@lru_cache(maxsize=32)
def _task(name: str, settings: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(settings))


@lru_cache(maxsize=1024)
def _decode(entry: str) -> dict[str, Any]:
    """Undo ``vexact.data.tasks.encode_entry``."""
    return json.loads(entry, object_hook=_restore)


def _restore(value: dict[str, Any]) -> Any:
    if "__tuple__" in value:
        return tuple(value["__tuple__"])
    if "__dict__" in value:
        return dict(value["__dict__"])
    return value
