"""The routes, who may use them, and how much they may send."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from vexact.rollout.stream import EngineClosedError, EngineFailedError
from vexact.serve import metrics
from vexact.serve.errors import ApiError, as_api_error
from vexact.serve.protocol import Body, ChatBody, CompletionBody, parse
from vexact.serve.reply import Reply, error_response
from vexact.serve.service import Service
from vexact.serve.settings import ServeSettings

_OPEN_PATHS = ("/health",)  # that need no key
_PATIENCE = 4  # limits of a body that are read, and dropped, so that its sender is still there to read the refusal


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of a service."""
    return Gate(_Routes(service).app, service)


class _Routes:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={HTTPException: self._refused, ApiError: self._failed, Exception: self._failed},
        )

    async def completions(self, request: Request) -> Response:
        return await self._reply(request, CompletionBody)

    async def chat(self, request: Request) -> Response:
        return await self._reply(request, ChatBody)

    async def models(self, request: Request) -> Response:
        names = self._service.settings.model_names
        return JSONResponse({"object": "list", "data": [self._described(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._described(name))

    async def health(self, request: Request) -> Response:
        """200 while requests are taken; a full queue is healthy."""
        refusal = self._service.engine.refusal
        if refusal is None:
            return JSONResponse({"status": "ok"})
        status = "failed" if isinstance(refusal, EngineFailedError) else "draining"
        return JSONResponse({"status": status, "message": str(refusal)}, 503)

    async def metrics(self, request: Request) -> Response:
        read = self._service.metrics.engine
        try:  # while it drains, too: requests are still running
            await self._service.engine.run(read.read)
        except (EngineClosedError, EngineFailedError):
            read.end()
        return Response(self._service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def _reply(self, request: Request, kind: type[Body]) -> Response:
        try:
            self._service.check_open()
            content = await _read(request, self._service.settings)
            body, sampling = parse(kind, content)
            self._check_model(body.model)
            job = await self._service.prepare(body, sampling)
        except ClientDisconnect:
            self._service.metrics.leave()
            return Response(status_code=400)  # to nobody
        except (ValueError, RuntimeError, ApiError) as raised:
            error = as_api_error(raised)
            self._service.metrics.fail(error.status)
            return error_response(error)
        return Reply(self._service, body, job)

    def _check_model(self, name: str | None) -> None:
        names = self._service.settings.model_names
        if name is not None and name not in names:
            raise ApiError(
                404,
                f"there is no model {name!r:.200} here; there is {', '.join(names)}",
                param="model",
                code="model_not_found",
            )

    def _described(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "vexact",
            "max_model_len": self._service.max_model_len,
        }

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    async def _failed(self, request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))


async def _read(request: Request, settings: ServeSettings) -> bytes:
    """The body. Raises ApiError if it is too large or too slow, or not declared as JSON.

    A page in a browser can send other types to any address without asking first.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "content-type must be application/json")
    limit, size, parts = settings.max_body_bytes, 0, []
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > _PATIENCE * limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(settings.receive_timeout):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > _PATIENCE * limit:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.receive_timeout:g} s") from None
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    message = f"the body is larger than {limit} bytes"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


class Gate:
    """Lets in who has the key; without one, who speaks to this machine by its own name: a page in a browser that had
    its name point here (DNS rebinding) does not."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics
        key = service.settings.api_key
        self._expected = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            self._metrics.fail(error.status)
            await error_response(error)(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if self._expected is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._expected):
                return None
            return ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        try:
            known = bool(hosts) and all(map(_is_this_machine, hosts))
        except ValueError:
            known = False
        return (
            None if known else ApiError(403, "without an API key, only requests to 127.0.0.1 or localhost are answered")
        )


def _is_this_machine(header: bytes) -> bool:
    """Raises ValueError for a host that is neither localhost nor an address."""
    host = urlsplit(f"//{header.decode('latin-1')}").hostname or ""
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
