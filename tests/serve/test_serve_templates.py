"""What a chat template refuses, in words for whoever sent the request: no key of the trainer's configuration."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vexact.prepare.tokenizers import byte_tokenizer
from vexact.serve.prompts import Limits, prepare
from vexact.serve.protocol import ChatBody

HI = [{"role": "user", "content": "hi"}]
SHOWS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{{ documents }}"


@pytest.mark.parametrize(
    ("template", "messages", "kwargs", "words"),
    [
        (None, HI, {}, "no chat template; send the text to /v1/completions, or serve a model directory with"),
        (SHOWS, [{"role": "user", "content": "<eos>"}], {}, "If the prompt is formatted already, send it to /v1/compl"),
        (SHOWS, HI, {"documents": []}, "chat_template_kwargs: 'documents' cannot be set; prompts are rendered as text"),
        (SHOWS, HI, {"add_generation_prompt": "no"}, "chat_template_kwargs: add_generation_prompt='no' must be true"),
        ("{{ raise_exception('no user') }}", HI, {}, "refuses messages of user: no user; change the messages, or send"),
        ("{{ messages[0].role }}", HI, {}, "leaves out message 0 (role 'user'): 'VexactMessage0End' becomes 'user'"),
    ],
)
def test_a_refusal_names_what_the_client_can_change(
    template: str | None, messages: list[Any], kwargs: dict[str, Any], words: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    body = ChatBody(messages=messages, chat_template_kwargs=kwargs)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        prepare(body, {}, tokenizer, Limits(512, 512, 8))
    assert not re.search(r"\b(data|trainer|actor_rollout_ref)\.|\brows?\b", str(refused.value))
