"""What came of one call of a grader: its return value judged, its exception described, the record sent and checked."""

from __future__ import annotations

import errno
import socket
import traceback
from typing import Any, Literal, NamedTuple

from vexact.reward.text import printable

# Scores are float32 in training, where they are squared and summed: beyond this the sums overflow.
MAX_SCORE = 1e15
MAX_KEYS, MAX_KEY_LENGTH = 100, 100
_SEALED = " (graders are sealed; if this one needs it, allow it in reward.sandbox, see docs/rewards.md)"
_MAX_MESSAGE, _MAX_TRACEBACK, _TRACEBACK_LINES = 500, 4000, 12


class ProtocolError(Exception):
    """A grader process sent something that is not an answer."""


class Outcome(NamedTuple):
    """What came of one call. ``kind`` groups errors of one sort; ``traceback`` is for the first of them."""

    status: Literal["ok", "error", "timeout"]
    value: float = 0.0
    extra: dict[str, float] | None = None
    kind: str = ""
    message: str = ""
    traceback: str = ""
    seconds: float = 0.0
    key: str = ""  # of the request it answers


def interpret(result: Any) -> Outcome:
    """A number within ±1e15, or a dict with such a ``score``; further numeric keys are kept, other keys are dropped."""
    if not isinstance(result, dict):
        value = _number(result)
        if value is None:
            wanted = "a finite number or a dict with 'score'"
            return _bad(f"the grader returned {result!r:.80}; it must return {wanted}{_beyond(result)}")
        return Outcome("ok", value)
    if len(result) > MAX_KEYS:
        return _bad(f"the grader returned a dict with {len(result)} keys; at most {MAX_KEYS} are taken")
    if "score" not in result:
        return _bad(f"the grader returned a dict without the key 'score'; its keys: {', '.join(map(str, result))}")
    extra: dict[str, float] = {}
    for key, item in result.items():
        value = _number(item)
        if value is not None:
            extra[str(key)[:MAX_KEY_LENGTH]] = value
        elif key == "score" or _is_numeric(item):
            return _bad(f"the grader returned {key}={item!r:.80}; it must be a finite number{_beyond(item)}")
    return Outcome("ok", extra.pop("score"), extra)


def _is_numeric(item: Any) -> bool:
    return isinstance(item, (int, float)) or hasattr(item, "__float__")


def _number(item: Any) -> float | None:
    """``item`` as a float within bounds; None when it is not one (text is never taken for a number)."""
    if isinstance(item, str) or not _is_numeric(item):
        return None
    try:
        value = float(item)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # arrays and tensors of several elements
        return None
    return value if abs(value) <= MAX_SCORE else None  # False for nan


def _beyond(item: Any) -> str:
    too_large = type(item) in (int, float) and MAX_SCORE < abs(item) < float("inf")
    return f" (beyond ±{MAX_SCORE:g} it overflows in training)" if too_large else ""


def _bad(message: str) -> Outcome:
    return Outcome("error", kind="bad value", message=message[:_MAX_MESSAGE])


def failure(error: BaseException) -> Outcome:
    """What a grader raised, whatever its ``__str__`` does."""
    kind = type.__getattribute__(type(error), "__name__")
    try:
        text = f"{kind}: {error}"
        hint = sandbox_hint(error)
        text = text[: _MAX_MESSAGE - len(hint)] + hint
        excerpt = "\n".join("".join(traceback.format_exception(error)).strip().splitlines()[-_TRACEBACK_LINES:])
    except BaseException:
        text, excerpt = f"{kind} (its text cannot be had)", ""
    return Outcome("error", kind=kind, message=text[:_MAX_MESSAGE], traceback=excerpt[-_MAX_TRACEBACK:])


def sandbox_hint(error: BaseException | None) -> str:
    """What to add to the text of an error that the sandbox may have caused, at its root; empty for others."""
    while error is not None:
        refused = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
        if refused or isinstance(error, (socket.gaierror, MemoryError)):
            return _SEALED
        error = error.__cause__ or error.__context__
    return ""


def checked_failure(fields: list[Any]) -> Outcome:
    """The failure a grader process sent, with its text made printable.

    Raises:
        ProtocolError: it is not one.
    """
    match fields:
        case [str(kind), str(message), str(trace), float(seconds)] if 0 <= seconds <= MAX_SCORE:
            text = printable(kind)[:_MAX_MESSAGE], printable(message)[: 4 * _MAX_MESSAGE], printable(trace, "\n\t")
            return Outcome("error", 0.0, {}, *text, seconds)
    raise ProtocolError("it is not an outcome")


def checked_score(value: float, extra: dict[str, Any], seconds: float) -> Outcome:
    """The score a grader process sent.

    Raises:
        ProtocolError: it is not one.
    """
    for number in (value, seconds, *extra.values()):
        if type(number) is not float or not abs(number) <= MAX_SCORE:
            raise ProtocolError("it is not a score")
    return Outcome("ok", value, extra, seconds=seconds)
