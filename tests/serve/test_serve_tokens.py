"""What is said of single tokens: their texts add up to the text, and each stands where it says it does."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from test_serve_text import byte_fallback_tokenizer, draw_tokens

from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout.stream import Stream
from vexact.serve.metrics import Metrics
from vexact.serve.reply import _event
from vexact.serve.text import TextReader, TokenTexts
from vexact.types import Sample


def test_a_word_keeps_its_space_but_at_the_beginning() -> None:
    tokenizer = byte_fallback_tokenizer()
    the, he, eos = tokenizer.convert_tokens_to_ids(["▁the", "he", "</s>"])
    reader = TextReader(tokenizer)
    said = TokenTexts(reader).push([the, the, he, eos, the])
    assert said == (["the", " the", "he", "</s>", " the"], [0, 3, 7, 9, 9])
    assert reader.decode([the, the, he, eos, the]) == "the thehe the"
    assert reader.token_bytes(the, " the") == list(b" the")


def test_parts_of_a_character_have_their_bytes() -> None:
    """Which is what a client joins them by."""
    reader = TextReader(byte_tokenizer())
    ids = reader.tokenizer("a日\ufffd😀", add_special_tokens=False)["input_ids"]
    texts, _ = TokenTexts(reader).push(ids)
    told = [reader.token_bytes(*each) for each in zip(ids, texts, strict=True)]
    assert texts.count("\ufffd") == 3 + 3 + 4
    assert bytes(byte for one in told if one is not None for byte in one) == "a日\ufffd😀".encode()
    assert reader.token_bytes(reader.tokenizer.eos_token_id, "\ufffd") is None  # no such token says that


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_offsets_are_places_of_the_text(make: Any) -> None:
    """Where a token begins is how long the text of those before it is, as far as no token can change it; special
    tokens take no room. A stream says the same."""
    reader, draw = TextReader(make()), random.Random(0)
    for _ in range(30):
        ids = draw_tokens(reader.tokenizer, draw)
        texts, offsets = TokenTexts(reader).push(ids)
        whole = reader.decode(ids)
        for place, (token, text, offset) in enumerate(zip(ids, texts, offsets, strict=True)):
            before = reader.decode(ids[:place])
            assert offset <= len(before)
            assert whole[:offset] == reader.decode(ids[: place + 1])[:offset]
            if token not in reader.special_ids and "\ufffd" not in text and token not in reader.byte_ids:
                assert whole[offset : offset + len(text)] == text
                assert offset == len(before)
        again, parts = TokenTexts(reader), []
        while ids:
            count = draw.choice([1, 3, 40])
            parts.append(again.push(ids[:count]))
            ids = ids[count:]
        assert [text for part in parts for text in part[0]] == texts
        assert [offset for part in parts for offset in part[1]] == offsets


@pytest.mark.parametrize("stop", [None, "a"])
def test_whole_and_streamed_answers_place_their_tokens_alike(client: openai.OpenAI, stop: str | None) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "offsets",
        "max_tokens": 60,
        "n": 2,
        "seed": 3,
        "logprobs": 0,
        "stop": stop,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**asked)
    tokens: dict[int, list[str]] = {0: [], 1: []}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == tokens[choice.index]
        assert choice.logprobs.text_offset == offsets[choice.index]
        for token, offset in zip(tokens[choice.index], offsets[choice.index], strict=True):
            if offset < len(choice.text) and len(token) == 1 and token != "\ufffd":
                assert choice.text[offset] == token


def test_an_event_is_one_line_however_lines_are_told_apart() -> None:
    said = {"text": "a\u2028b\u2029c\x85d\ne\r\x0b\x1c日"}
    event = _event(said)
    assert len(event.decode().splitlines()) == 2  # the event, and the empty line behind it
    assert json.loads(event.decode().removeprefix("data: ")) == said


def test_a_sample_that_waited_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time per token of a sample begins with its own first token, not with that of the others."""
    monkeypatch.setattr("vexact.serve.metrics.time", SimpleNamespace(monotonic=lambda: 110.0))
    stream = Stream(asyncio.new_event_loop(), 2, live=False)
    stream.asked_at, stream.first_tokens_at = 100.0, {0: 101.0, 1: 109.0}
    values = np.zeros(6, np.float32)
    metrics = Metrics("tiny")
    metrics.end(stream, 1, Sample("r/1", (1,), (2,) * 6, values, values, 1.0, "length", 0))
    text = metrics.text().decode()
    assert 'time_to_first_token_seconds_sum{model_name="tiny"} 9.0' in text
    assert 'time_per_output_token_seconds_sum{model_name="tiny"} 0.2' in text
    stream.loop.close()
