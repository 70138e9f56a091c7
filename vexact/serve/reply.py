"""The reply to one request for text, as an ASGI application: whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vexact.rollout.stream import Delta, Stream
from vexact.serve.answers import Answer
from vexact.serve.errors import ApiError, as_api_error
from vexact.serve.prompts import Job
from vexact.serve.protocol import Body
from vexact.serve.service import Service


class Reply(Response):
    """Runs the job while it is sent. A client that goes away takes its requests along."""

    def __init__(self, service: Service, body: Body, job: Job) -> None:
        super().__init__()
        self._service, self._body, self._job = service, body, job
        self._answer = Answer(body, job, service.model, service.reader)
        self._is_begun = False  # the client has got the beginning of a stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await while_connected(self._run(scope, receive, send), receive):
            self._service.metrics.leave()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with self._service.engine.stream_all(self._job.asks, live=self._body.stream) as stream:
                started = True
                for ask in self._job.asks:
                    self._service.metrics.begin(len(ask.prompt_token_ids))
                if self._body.stream:
                    await self._send_events(stream, send)
                else:
                    response = await self._whole(stream)
                    await response(scope, receive, send)
        except Exception as raised:
            error = as_api_error(raised, started=started)
            self._service.metrics.fail(error.status)
            if self._is_begun:
                await _send_part(send, _event(error.body) + _DONE, more=False)
            else:
                await error_response(error)(scope, receive, send)

    async def _whole(self, stream: Stream) -> Response:
        choices: dict[int, Delta] = {}
        async for delta in stream:
            choices[delta.index] = delta
            self._count(stream, delta)
        headers = {"x-request-id": self._job.name}
        return JSONResponse(self._answer.whole(choices), headers=headers)

    async def _send_events(self, stream: Stream, send: Send) -> None:
        async for delta in stream:
            if not self._is_begun:
                await self._begin(send)
            self._count(stream, delta)
            content = b"".join(map(_event, self._answer.chunks(delta)))
            if content:
                await _send_part(send, content)
        last = _event(self._answer.last_chunk()) if self._body.wants_usage else b""
        await _send_part(send, last + _DONE, more=False)

    async def _begin(self, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-request-id": self._job.name,
        }
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": encoded})
        self._is_begun = True

    def _count(self, stream: Stream, delta: Delta) -> None:
        if delta.sample is not None:
            self._service.metrics.end(stream, delta.index, delta.sample)


_DONE = b"data: [DONE]\n\n"


# What Python's str.splitlines takes for the end of a line, and JSON does not escape: clients read events by lines.
_LINE_ENDS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.translate(_LINE_ENDS).encode() + b"\n\n"


async def _send_part(send: Send, content: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": more})


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Runs ``work`` to its end, or cancels it when the client leaves; whether it came to its end."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
