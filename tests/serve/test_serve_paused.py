"""Clients of an engine that is paused, as it is for an update of its weights."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from processes import until

from vexact.rollout.async_engine import AsyncEngine
from vexact.rollout.engine import Engine
from vexact.serve.server import Server

ASKED: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4, "extra_body": {"ignore_eos": True}}


@contextmanager
def paused(server: Server) -> Iterator[AsyncEngine]:
    driven = server._service.engine
    asyncio.run(driven.pause())
    try:
        yield driven
    finally:
        asyncio.run(driven.resume())


def left(server: Server, body: str) -> socket.socket:
    """A client that has asked and does not wait."""
    address = urlsplit(server.url)
    sent = socket.create_connection((address.hostname, address.port))
    head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    sent.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
    return sent


@pytest.mark.parametrize("streamed", ["true", "false"])
def test_a_client_that_leaves_in_a_pause_frees_everything(client: openai.OpenAI, server: Server, streamed: str) -> None:
    body = f'{{"model": "tiny", "prompt": ["x", "yy"], "n": 3, "max_tokens": 400, "stream": {streamed}}}'
    with paused(server) as driven:
        with left(server, body):
            assert until(lambda: driven.num_unfinished == 6)
        assert until(lambda: driven.num_unfinished == 0), "the places of who left are taken until the engine goes on"
        assert driven.submit(lambda _: len(driven._held)).result() == 0
        driven.submit(Engine.check_idle).result()
    assert driven.submit(lambda engine: sum(engine.num_requests)).result() == 0
    assert client.completions.create(**ASKED).usage.completion_tokens == 4


@pytest.mark.parametrize("streamed", [True, False])
def test_a_choice_that_is_aborted_in_a_pause_says_so(client: openai.OpenAI, server: Server, streamed: bool) -> None:
    asked = ASKED | {"n": 3, "stream": streamed}
    ends: dict[int, str | None] = {}

    def ask() -> int:
        answer = client.completions.create(**asked, **({"stream_options": {"include_usage": True}} if streamed else {}))
        chunks = list(answer) if streamed else [answer]
        ends.update({one.index: one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason})
        return int(chunks[-1].usage.completion_tokens)

    with ThreadPoolExecutor(1) as pool:
        with paused(server) as driven:
            tokens = pool.submit(ask)
            assert until(lambda: driven.num_unfinished == 3)
            (order,) = driven.submit(lambda _: list(driven._held)).result()
            assert asyncio.run(driven.abort(order.ask.names[1])) == order.ask.names[1:2]
            assert driven.num_unfinished == 2
        assert tokens.result() == 8
    assert ends == {0: "length", 1: "abort", 2: "length"}
