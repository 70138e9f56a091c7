"""Errors as OpenAI's clients know them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vexact.rollout.stream import EngineClosedError, EngineFailedError, QueueFullError

_PARAMETER = re.compile(r"sampling parameter (\w+)")
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be answered, and why. ``param`` is the parameter to change, ``code`` for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException, *, started: bool = False) -> ApiError:
    """What the client is told of an exception of any layer. Once the engine has ``started``, none is the client's."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
        case EngineClosedError():
            return ApiError(503, str(error), code="shutting_down", headers={"connection": "close"})
        case EngineFailedError():
            return ApiError(503, str(error), code="engine_failed")
        case ValueError() if not started:
            named = _PARAMETER.search(str(error))
            return ApiError(400, str(error), param=named[1] if named else None)
        case _:
            return ApiError(500, f"{type(error).__name__}: {error}", code="internal_error")
