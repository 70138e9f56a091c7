"""What a request asks for and cannot have, as the official client is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]

REFUSED: list[tuple[Callable[[openai.OpenAI], Any], type[openai.APIError], str, str | None]] = [
    (lambda c: c.completions.create(model="gpt", prompt="x"), openai.NotFoundError, "no model 'gpt' here", "model"),
    (lambda c: c.models.retrieve("gpt"), openai.NotFoundError, "no model 'gpt' here", "model"),
    (lambda c: c.embeddings.create(model="tiny", input="x"), openai.NotFoundError, "/v1/embeddings: Not Found", None),
    (lambda c: c.completions.create(model="tiny", prompt="x", top_p=0), openai.BadRequestError, "top_p=0", "top_p"),
    (lambda c: c.completions.create(model="tiny", prompt="x", seed=-1), openai.BadRequestError, "seed=-1", "seed"),
    (
        lambda c: c.chat.completions.create(model="tiny", messages=CHAT, seed=2**63),
        openai.BadRequestError,
        "seed=9223372036854775808 must be >= 0 and <= 2^63 - 1",
        "seed",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", logprobs=2),
        openai.BadRequestError,
        "logprobs=2",
        "logprobs",
    ),
    (lambda c: c.completions.create(model="tiny", prompt="x", echo=True), openai.BadRequestError, "echo=True", "echo"),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", best_of=2),
        openai.BadRequestError,
        "best_of=2",
        "best_of",
    ),
    (lambda c: c.completions.create(model="tiny", prompt=[]), openai.BadRequestError, "holds no prompt", "prompt"),
    (
        lambda c: c.completions.create(model="tiny", prompt=["a", [1]]),
        openai.BadRequestError,
        "must be a text",
        "prompt",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt=[1, 9999]),
        openai.BadRequestError,
        "id 9999 is outside",
        None,
    ),
    (lambda c: c.completions.create(model="tiny", prompt=""), openai.BadRequestError, "tokenises to nothing", None),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", max_tokens=600),
        openai.BadRequestError,
        "max_model_len=512",
        None,
    ),
    (lambda c: c.completions.create(model="tiny", prompt="x", n=99), openai.BadRequestError, "more than the 32", None),
    (  # others would wait for so many to be tokenised
        lambda c: c.completions.create(model="tiny", prompt=["x"] * 5000),
        openai.BadRequestError,
        "5000 prompts at once are more than the 32 samples",
        "prompt",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", stop=["y"] * 65),
        openai.BadRequestError,
        "holds 65",
        "stop",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", stream_options={"include_usage": True}),
        openai.BadRequestError,
        "needs stream=true",
        "stream_options",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", extra_body={"tempratur": 1}),
        openai.BadRequestError,
        "unknown parameter tempratur; did you mean temperature?",
        "tempratur",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", extra_body={"min_token": 1}),
        openai.BadRequestError,
        "unknown parameter min_token; did you mean min_tokens? It is not supported: it forbids stop tokens",
        "min_token",
    ),
    (
        lambda c: c.completions.create(
            model="tiny", prompt="x", stream=True, extra_body={"stream_options": {"include_usag": True}}
        ),
        openai.BadRequestError,
        "unknown parameter stream_options.include_usag; did you mean stream_options.include_usage?",
        "stream_options.include_usag",
    ),
    (
        lambda c: c.completions.create(
            model="tiny", prompt="x", stream=True, stream_options={"include_obfuscation": True}
        ),
        openai.BadRequestError,
        "stream_options.include_obfuscation=True: input should be False",
        "stream_options.include_obfuscation",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", extra_body={"add_special_tokens": False}),
        openai.BadRequestError,
        "add_special_tokens=False is not supported",
        "add_special_tokens",
    ),
    (
        lambda c: c.chat.completions.create(model="tiny", messages=CHAT, extra_body={"chat_template": "{{ 1 }}"}),
        openai.BadRequestError,
        "the template of the model's directory is used",
        "chat_template",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", extra_body={"return_token_ids": "yes"}),
        openai.BadRequestError,
        "return_token_ids='yes'",
        "return_token_ids",
    ),
    (
        lambda c: c.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=3),
        openai.BadRequestError,
        "top_logprobs=3 is not supported: the engine gives the exact",
        "top_logprobs",
    ),
    (
        lambda c: c.chat.completions.create(model="tiny", messages=CHAT, logit_bias={"5": -100}),
        openai.BadRequestError,
        "logit_bias={'5': -100} is not supported: it changes logits",
        "logit_bias",
    ),
    (
        lambda c: c.completions.create(model="tiny", prompt="x", extra_body={"min_tokens": 2}),
        openai.BadRequestError,
        "min_tokens=2 is not supported: it forbids stop tokens",
        "min_tokens",
    ),
    (
        lambda c: c.chat.completions.create(
            model="tiny", messages=CHAT, tools=[{"type": "function", "function": {"name": "f"}}]
        ),
        openai.BadRequestError,
        "tools=",
        "tools",
    ),
    (lambda c: c.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError, "holds no messages", None),
    (
        lambda c: c.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "<eos>"}]),
        openai.BadRequestError,
        "holds '<eos>', a special token",
        None,
    ),
    (
        lambda c: c.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        ),
        openai.BadRequestError,
        "'image_url'",
        None,
    ),
    (
        lambda c: c.chat.completions.create(
            model="tiny", messages=CHAT, extra_body={"chat_template_kwargs": {"enable_thinkin": False}}
        ),
        openai.BadRequestError,
        "the model's chat template has no variable 'enable_thinkin'",
        "chat_template_kwargs",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words", "param"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI,
    call: Callable[[openai.OpenAI], Any],
    kind: type[openai.APIError],
    words: str,
    param: str | None,
) -> None:
    with pytest.raises(kind) as caught:
        call(client)
    assert words in caught.value.body["message"]
    assert caught.value.param == param
