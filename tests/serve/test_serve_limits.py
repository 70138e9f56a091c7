"""Who is let in, how much, and what becomes of requests when the server ends."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest
from processes import PATIENCE_S, until
from serve_support import holding, serving, tiny_engine

from vexact.serve.errors import ApiError
from vexact.serve.prompts import LONG_TEXT, num_characters, prepare
from vexact.serve.protocol import Body, ChatBody, CompletionBody, _each_name_once
from vexact.serve.server import Server
from vexact.serve.settings import ServeSettings, is_loopback, listening_socket

LONG: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 500, "extra_body": {"ignore_eos": True}}
SHORT = LONG | {"max_tokens": 3}


def connect(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


def ask(server: Server, path: str, content: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a plain request."""
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, content, sent)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def narrow() -> Any:
    """One slot, no queue, a key, small bodies."""
    engine = tiny_engine(max_num_seqs=1, page_size=16)
    with serving(engine, api_key="secret", max_queue=0, max_body_bytes=2000) as running:
        yield running


def test_a_wrong_key_lets_nobody_in(narrow: Server) -> None:
    for key in ("wrong", "secre", "secrets"):
        with (
            connect(narrow, key) as client,
            pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"),
        ):
            client.models.list()
    for path in ("/v1/models", "/metrics", "/nowhere", "/v1/completions"):
        assert ask(narrow, path)[0] == 401
    for header in ("secret", "Basic secret", "Bearer", "Bearer  ", "Bearersecret", "Bearer secret secret"):
        assert ask(narrow, "/v1/models", authorization=header)[0] == 401
    for header in ("bearer secret", "BEARER  secret"):  # a scheme is the same in any case
        assert ask(narrow, "/v1/models", authorization=header)[0] == 200
    assert ask(narrow, "/health") == (200, {"status": "ok"})
    with connect(narrow, "secret") as client:
        assert client.completions.create(**SHORT).usage.completion_tokens == 3


def test_a_full_queue_is_429_and_the_client_may_try_again(narrow: Server) -> None:
    with connect(narrow, "secret") as client:
        running = threading.Thread(target=client.completions.create, kwargs=LONG)
        with holding(narrow):
            running.start()
            assert until(lambda: narrow._service.engine.num_unfinished == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**SHORT)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")
        assert client.with_options(max_retries=1000).completions.create(**SHORT).choices
        running.join()


def test_a_name_that_is_there_twice_is_found_in_one_pass() -> None:
    """A body may hold a million names, and nobody else is answered while it is read."""

    class Counting(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counting.compared += 1
            return str.__eq__(self, other)

    names = [f"name{index}" for index in range(500)]
    pairs = [(Counting(name), 0) for name in (*names, "twice", "twice")]
    with pytest.raises(ApiError, match="'twice' is there twice in one object"):
        _each_name_once(pairs)
    assert Counting.compared < len(pairs)


def test_a_body_that_is_too_large_or_no_json_is_refused(narrow: Server) -> None:
    key = {"authorization": "Bearer secret"}
    with connect(narrow, "secret") as client:
        for size in (2100, 7000, 300_000):  # the last is not even read
            with pytest.raises(openai.APIError) as caught:
                client.completions.create(model="tiny", prompt="x" * size)
            assert size > 8000 or caught.value.code == "body_too_large"
    assert ask(narrow, "/v1/completions", b"{", **key)[1]["error"]["message"].startswith("the body is no JSON")
    assert ask(narrow, "/v1/completions", b"[1]", **key)[0] == 400
    assert ask(narrow, "/v1/completions", b'{"prompt": ' + b"[" * 1500, **key)[0] == 400
    assert ask(narrow, "/v1/completions", b"\xff", **key)[0] == 400
    for twice in (b'{"seed": 1, "prompt": "x", "seed": 2}', b'{"prompt": "x", "metadata": {"seed": 1, "seed": 1}}'):
        status, answer = ask(narrow, "/v1/completions", twice, **key)
        assert (status, answer["error"]["param"]) == (400, "seed")
        assert answer["error"]["message"].startswith("'seed' is there twice in one object")
    assert ask(narrow, "/v1/completions", rb'{"\ud800": 1, "\ud800": 2}', **key)[0] == 400
    role = rb'{"messages": [{"role": "\ud800", "content": "x"}]}'  # JSON can name what UTF-8 cannot hold
    assert "lone surrogate" in ask(narrow, "/v1/chat/completions", role, **key)[1]["error"]["message"]
    assert ask(narrow, "/v1/completions", b"{}", content_type="text/plain", **key)[0] == 415
    assert ask(narrow, "/v1/completions", **key)[0] == 405


def test_a_body_that_does_not_come_is_refused() -> None:
    with (
        serving(tiny_engine(max_num_seqs=1, page_size=16), receive_timeout=0.3) as server,
        socket.create_connection(server._socket.getsockname()) as slow,
    ):
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_long_text_keeps_no_short_one_waiting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    read, may_go_on = threading.Event(), threading.Event()

    def slowly(body: Body, *more: Any) -> Any:
        if num_characters(body) > LONG_TEXT:
            read.set()
            assert may_go_on.wait(PATIENCE_S)
        return prepare(body, *more)

    monkeypatch.setattr("vexact.serve.service.prepare", slowly)
    answers: list[tuple[int, dict[str, Any]]] = []
    content = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * (LONG_TEXT + 1)}]}]})
    waiting = threading.Thread(
        target=lambda: answers.append(ask(server, "/v1/chat/completions", content.encode())), daemon=True
    )
    waiting.start()
    try:
        assert read.wait(PATIENCE_S)
        with connect(server) as client:
            assert client.completions.create(**SHORT).usage.completion_tokens == 3
        assert not answers
    finally:
        may_go_on.set()
    waiting.join(PATIENCE_S)
    assert "exceed max_model_len=512" in answers[0][1]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (CompletionBody(prompt="abc"), 3),
        (CompletionBody(prompt=["abc", "d"]), 4),
        (CompletionBody(prompt=[1, 2]), 0),
        (CompletionBody(prompt_token_ids=[1]), 0),
        (ChatBody(messages=[{"role": "user", "content": "abc"}]), 4 + 4 + 7 + 3),
        (ChatBody(messages=[], chat_template_kwargs={"date": "today"}), 4 + 5),
    ],
)
def test_what_is_long_is_all_that_has_to_be_tokenised(body: Body, expected: int) -> None:
    assert num_characters(body) == expected


def test_without_a_key_only_this_machine_is_served_by_its_own_name(server: Server) -> None:
    assert ask(server, "/v1/models", host="evil.example")[0] == 403
    assert ask(server, "/v1/models", host="localhost:1")[0] == ask(server, "/v1/models", host="[::1]")[0] == 200
    name = server.url.removeprefix("http://")
    for hosts in (("evil.example", name), (name, "evil.example")):
        head = "".join(f"host: {host}\r\n" for host in hosts)
        with socket.create_connection(server._socket.getsockname(), timeout=PATIENCE_S) as sent:
            sent.sendall(f"GET /v1/models HTTP/1.1\r\n{head}connection: close\r\n\r\n".encode())
            assert sent.makefile("rb").readline().split()[1] in (b"400", b"403")  # 400 where the parser knows better


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "host=0.0.0.0 can be reached from other machines"),
        ({"host": "::"}, "can be reached"),
        ({"host": ""}, "can be reached"),
        ({"host": "no.such.host.invalid"}, "no address of this machine"),
        ({"api_key": " "}, "api_key must be printable"),
        ({"api_key": "é"}, "api_key must be printable"),
        ({"api_key": "key "}, "neither begins nor ends with a space"),
        ({"port": 70000}, "port=70000"),
        ({"drain_timeout": 0.0}, "drain_timeout=0.0"),
        ({"model_names": ("a", "")}, "served_model_name"),
        ({"model_names": ("m\udcff",)}, "cannot be printed"),  # of a directory whose name is no text
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeSettings(**{"model_names": ("m",)} | settings)


def test_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "127.8.8.8")))
    assert ServeSettings(("m",), host="0.0.0.0", api_key="k").host == "0.0.0.0"
    with listening_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: Address already in use"):
            listening_socket("127.0.0.1", port)


def metric(server: Server, name: str) -> float | None:
    """As `/metrics` tells it."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"vexact:{name}{{")), None)


def begin_the_drain(server: Server) -> None:
    loop = server._loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(server._service.drain(), loop)
    assert until(lambda: server._service.engine.refusal is not None)
    assert ask(server, "/health") == (
        503,
        {"status": "draining", "message": "the engine drains: it ends what runs and takes no more"},
    )


def watch_the_drain(server: Server) -> None:
    """What runs, and what it samples, is counted on all the same."""
    before, steps = metric(server, "generation_tokens_total"), metric(server, "engine_steps_total")
    assert before is not None
    assert steps is not None
    while (running := metric(server, "num_requests_running")) and metric(server, "generation_tokens_total") == before:
        time.sleep(0.005)
    assert running == 0 or (metric(server, "generation_tokens_total") or 0) > before


@pytest.mark.parametrize("in_time", [True, False])
def test_the_end_answers_what_runs(in_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Any] = []
    late = threading.Event()
    engine = tiny_engine(max_num_seqs=2, page_size=16)
    with serving(engine, drain_timeout=PATIENCE_S if in_time else 1.0) as server, connect(server) as client:
        driven = server._service.engine
        abort = driven.abort

        def told_late() -> Any:
            late.set()
            return abort()

        def whole() -> None:
            ends.extend(choice.finish_reason for choice in client.completions.create(**LONG, n=2).choices)

        def streamed() -> None:
            ends.append(
                [chunk.choices[0].finish_reason for chunk in client.completions.create(**LONG, stream=True)][-1]
            )

        monkeypatch.setattr(driven, "abort", told_late)
        clients = [threading.Thread(target=target) for target in (whole, streamed)]
        stopping = threading.Thread(target=server.stop)
        with holding(server):
            for one in clients:
                one.start()
            assert until(lambda: driven.num_unfinished == 3)
            if in_time:
                begin_the_drain(server)
            else:
                stopping.start()
                assert late.wait(PATIENCE_S)
        if in_time:
            watch_the_drain(server)
            stopping.start()
        for one in (*clients, stopping):
            one.join()
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    assert ends == ["length" if in_time else "abort"] * 3


def test_a_failed_engine_is_503_and_its_requests_are_told() -> None:
    engine = tiny_engine(max_num_seqs=2, page_size=16)
    with serving(engine) as server, connect(server) as client:
        driven = server._service.engine
        page = driven.submit(lambda engine: engine._blocks.allocate()).result()
        with pytest.raises(openai.InternalServerError, match="still referenced"):
            client.completions.create(**SHORT)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**SHORT)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_failed")
        assert ask(server, "/health")[0] == 503
        assert metric(server, "num_requests_running") is None  # nothing runs any more, and nothing is known of it
        engine._blocks.release([page])


def test_an_error_in_a_stream_is_an_event_that_the_client_raises() -> None:
    engine = tiny_engine(max_num_seqs=2, page_size=16)
    with serving(engine) as server, connect(server) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))

        def poison(engine: Any) -> None:
            engine.model.norm.weight.data[0] = float("nan")

        server._service.engine.submit(poison).result()
        with pytest.raises(openai.APIError, match="log-probability nan"):
            list(stream)


def test_tokens_are_served_without_a_tokenizer() -> None:
    with serving(tiny_engine(with_tokenizer=False)) as server, connect(server) as client:
        answer = client.completions.create(
            model="tiny", prompt=[1, 2], logprobs=0, extra_body={"return_token_ids": True}
        )
        assert len(answer.choices[0].token_ids) == 16
        for text in ("x", ["x"]):
            with pytest.raises(openai.BadRequestError, match="no tokenizer"):
                client.completions.create(model="tiny", prompt=text)
        streamed = list(client.completions.create(model="tiny", prompt=[1, 2], stream=True))
        assert streamed[-1].choices[0].finish_reason == "length"
