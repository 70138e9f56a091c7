"""reasoning-gym answers, graded by the task's own scorer (which may give partial credit)."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

try:
    import reasoning_gym
except ImportError as missing:
    raise ImportError("reasoning-gym tasks need the package reasoning-gym: pip install 'vexact[tasks]'") from missing

from vexact.data.task_answers import answer_kind
from vexact.reward.graders.answer_text import readable
from vexact.reward.graders.gate import RefusedEvaluation, evaluation_gate

_OPEN, _CLOSE = "<answer>", "</answer>"


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """``score`` is the task's own score in 0..1; ``acc`` is 1.0 only for full marks.

    The answer is the text between the last ``<answer>`` tags, or the whole response when there are none. What the
    task's scorer cannot read without executing it counts as unreadable; an answer at which it fails scores 0.

    Raises:
        ValueError: the row does not carry its task entry, or the task is refused.
    """
    if not extra_info or "entry" not in extra_info:
        raise ValueError(
            f"rows of {data_source!r} need extra_info.entry; make them with the data source "
            "'reasoning_gym:NAME' or with 'vexact prepare task NAME'"
        )
    name = data_source.partition("/")[2]
    kind = answer_kind(name)
    task, entry = _task(name, extra_info.get("task_settings") or "{}"), _decode(extra_info["entry"])
    answer = readable(kind, _answer(solution_str), entry)
    try:
        with evaluation_gate():
            score = float(task.score_answer(answer=answer, entry=entry))
    except RefusedEvaluation:
        raise
    except Exception:  # many scorers raise at text that they cannot read
        score = 0.0
    return {"score": score, "acc": float(score >= 1.0)}


def _answer(response: str) -> str:
    start = response.rfind(_OPEN, 0, max(0, response.rfind(_CLOSE)))
    if start < 0:
        return response.strip()
    start += len(_OPEN)
    return response[start : response.index(_CLOSE, start)].strip()


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
