"""From a request's body to what the engine is asked: token ids, sampling parameters, and ids that draws depend on."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vexact.data.chat_template import Fixes, unknown_variables
from vexact.data.messages import texts
from vexact.data.rows import Row
from vexact.data.template import PromptFormat, tokenize
from vexact.rollout import SamplingParams
from vexact.rollout.stream import Ask
from vexact.serve.errors import ApiError
from vexact.serve.protocol import Body, ChatBody, CompletionBody
from vexact.types import Sample

SEEDED = "0"  # what draws depend on, besides the seed, where a request has a seed and no id of its own
LONG_TEXT = 1 << 16  # characters; a tokenizer reads so many in less than a tenth of a second
FIXES = Fixes(
    kwargs="chat_template_kwargs",
    refused="change the messages, or send the prompt as you mean it to /v1/completions",
    formatted="take it out of the message. If the prompt is formatted already, send it to /v1/completions",
    no_template="send the text to /v1/completions, or serve a model directory with a chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may fill."""

    max_model_len: int
    num_cache_tokens: int
    max_samples: int  # that run and wait

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its response; the last one is never fed back."""
        return min(self.max_model_len, self.num_cache_tokens + 1)

    def room(self, num_prompt_tokens: int) -> int:
        """Most tokens that can be sampled after a prompt. At least 1, for the engine to refuse by name."""
        return max(1, self.longest - num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """A request made ready."""

    name: str  # of the answer, unique
    asks: tuple[Ask, ...]  # one per prompt
    stop: tuple[str, ...]

    @property
    def num_samples(self) -> int:
        """Of each prompt."""
        return self.asks[0].num_samples

    def stop_reason(self, sample: Sample) -> str | int | None:
        """What of the request's ``stop`` and ``stop_token_ids`` ended a sample; None for an end-of-sequence token."""
        asked = tuple(self.asks[0].sampling_params.stop_token_ids or ())
        return sample.stop_reason if isinstance(sample.stop_reason, str) or sample.stop_reason in asked else None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(ask.prompt_token_ids) for ask in self.asks)


def num_characters(body: Body) -> int:
    """Of the text that has to be tokenised."""
    if isinstance(body, ChatBody):
        return sum(map(len, texts([body.messages, body.chat_template_kwargs])))
    assert isinstance(body, CompletionBody)
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


def prepare(body: Body, sampling: dict[str, Any], tokenizer: Any, limits: Limits) -> Job:
    """Raises ValueError or ApiError: what the client has to change."""
    chat = isinstance(body, ChatBody)
    prompts = _chat_prompt(body, tokenizer) if isinstance(body, ChatBody) else _prompts(body, tokenizer, limits)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    drawn = body.request_id or (name if sampling.get("seed") is None else SEEDED)
    asks = []
    for index, prompt in enumerate(prompts):
        own = {"max_tokens": limits.room(len(prompt))} if chat else {}
        mark = f"-{index}" if len(prompts) > 1 else ""
        asks.append(Ask(prompt, SamplingParams(**(own | sampling)), name + mark, drawn + mark))
    return Job(name, tuple(asks), tuple(asks[0].sampling_params.stop or ()))


def _chat_prompt(body: ChatBody, tokenizer: Any) -> list[Sequence[int]]:
    if body.prompt_token_ids is not None:
        if body.messages is not None or body.chat_template_kwargs:
            raise ApiError(400, "prompt_token_ids is the whole prompt; leave out messages and chat_template_kwargs")
        return [body.prompt_token_ids]
    if body.messages is None:
        raise ApiError(400, "messages is missing (or give the tokens as prompt_token_ids)", param="messages")
    _require(tokenizer, "messages")
    given = body.chat_template_kwargs or {}
    if tokenizer.chat_template and (unknown := unknown_variables(given, tokenizer)):
        raise ApiError(
            400,
            f"chat_template_kwargs: the model's chat template has no variable {unknown[0]!r:.80}",
            param="chat_template_kwargs",
            code="unknown_parameter",
        )
    form = PromptFormat(apply_chat_template_kwargs=given, fixes=FIXES)
    return list(tokenize([Row(tuple(body.messages), "", "", where="messages")], tokenizer, form))


def _prompts(body: Body, tokenizer: Any, limits: Limits) -> list[Sequence[int]]:
    assert isinstance(body, CompletionBody)
    prompt = body.prompt
    if (prompt is None) == (body.prompt_token_ids is None):
        raise ApiError(400, "give one of prompt and prompt_token_ids", param="prompt")
    if prompt is None:
        return [body.prompt_token_ids or []]
    prompts = prompt if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if not prompts:
        raise ApiError(400, "prompt=[] holds no prompt", param="prompt")
    if len(prompts) > limits.max_samples:  # before others wait for so many to be tokenised
        raise ApiError(
            400,
            f"{len(prompts)} prompts at once are more than the {limits.max_samples} samples that the engine runs and "
            "queues; send fewer",
            param="prompt",
        )
    if all(isinstance(item, str) for item in prompts):
        _require(tokenizer, "a prompt of text")
        rows = [Row(text, "", "", where=f"prompt {number}") for number, text in enumerate(prompts)]
        return list(tokenize(rows, tokenizer, PromptFormat(apply_chat_template=False)))
    if all(_is_ids(item) for item in prompts):
        return prompts
    raise ApiError(400, "prompt must be a text, a list of token ids, or a list of one of the two", param="prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _require(tokenizer: Any, what: str) -> None:
    if tokenizer is None:
        raise ApiError(400, f"this model has no tokenizer, so {what} cannot be read; send prompt_token_ids")
