"""What a request may say: OpenAI's parameters, those of ``SamplingParams``, and token ids in and out.

A parameter that this server does not know, or knows and cannot honour, is refused by name.
"""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vexact.config.checks.refused_sampling import REFUSED_SAMPLING, check_refused_sampling
from vexact.serve.errors import ApiError

SAMPLING = frozenset(
    (
        *("n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("stop", "stop_token_ids", "ignore_eos", "prompt_logprobs"),
    )
)
_MOST = {"stop": 64, "stop_token_ids": 256}

# Parameters that others have, the values at which they do nothing, and why others cannot be had; beside those of
# REFUSED_SAMPLING.
_NOTHING: tuple[Any, ...] = ("", [], {}, False)
_TOOLS = "tool calls are not parsed; put what the model needs to know into the messages and read its text"
_SHAPED = "only free text is sampled: a constraint would change the distribution that the log-probabilities are of"
_TEXT = "the model reads and writes text"
_DRAWN = "every sample that is drawn is returned"
_SPECIAL = "text is shown without special tokens; return_token_ids gives them"
_ELSEWHERE = "nothing is taken from or given to another server"
REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), _DRAWN),
    "use_beam_search": (_NOTHING, _DRAWN),
    "length_penalty": ((1,), _DRAWN),
    "echo": (_NOTHING, "the prompt is not repeated; return_token_ids gives its tokens"),
    "suffix": (_NOTHING, "there is no insertion into a text"),
    "top_logprobs": ((0,), "the engine gives the exact log-probability of the sampled token only"),
    "response_format": (({"type": "text"},), _SHAPED),
    "structured_outputs": (_NOTHING, _SHAPED),
    "guided_json": (_NOTHING, _SHAPED),
    "guided_regex": (_NOTHING, _SHAPED),
    "guided_choice": (_NOTHING, _SHAPED),
    "guided_grammar": (_NOTHING, _SHAPED),
    "tools": (_NOTHING, _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (_NOTHING, _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "modalities": ((["text"],), _TEXT),
    "audio": (_NOTHING, _TEXT),
    "prediction": (_NOTHING, "nothing is predicted"),
    "reasoning_effort": (_NOTHING, "chat templates take theirs from chat_template_kwargs"),
    "verbosity": (_NOTHING, "chat templates take theirs from chat_template_kwargs"),
    "web_search_options": (_NOTHING, "there is no search"),
    "store": ((False,), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "priority": ((0,), "requests are served in their order"),
    "skip_special_tokens": ((True,), _SPECIAL),
    "spaces_between_special_tokens": ((True, False), _SPECIAL),
    "return_tokens_as_token_ids": ((False,), "return_token_ids gives the tokens' ids"),
    "include_reasoning": ((True,), "reasoning is not told from the answer"),
    "thinking_token_budget": ((), "reasoning is not told from the answer"),
    "logits_processors": (_NOTHING, _SHAPED),
    "structural_tag": (_NOTHING, _SHAPED),
    "cache_salt": (_NOTHING, "equal prefixes are shared by all requests, or with --no_prefix_caching by none"),
    "kv_transfer_params": (_NOTHING, _ELSEWHERE),
    "vllm_xargs": (_NOTHING, _ELSEWHERE),
    "prompt_embeds": (_NOTHING, _TEXT),
    "mm_processor_kwargs": (_NOTHING, _TEXT),
    "documents": (_NOTHING, "put what the model needs to know into the messages"),
    "chat_template": ((), "the template of the model's directory is used"),
    "include_stop_str_in_output": ((False,), "text ends before a stop string; return_token_ids gives its tokens"),
    "truncate_prompt_tokens": (_NOTHING, "a prompt is taken whole or refused"),
    "add_generation_prompt": ((True,), "set it in chat_template_kwargs"),
    "continue_final_message": ((False,), "send the tokens so far as prompt_token_ids"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class Body(_Strict, ABC):
    """What both endpoints take besides ``SAMPLING``."""

    adds_special_tokens: ClassVar[bool]  # those that the tokenizer itself puts before a prompt

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_token_ids: list[int] | None = None
    return_token_ids: bool = False
    request_id: str | None = Field(None, min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")
    user: str | None = None  # labels: they change nothing by definition
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    @abstractmethod
    def wants_logprobs(self) -> bool:
        """Of every token, with the text."""

    @property
    def wants_usage(self) -> bool:
        """In a stream, as its last chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(Body):
    adds_special_tokens = True
    prompt: Any = None  # text, token ids, or a list of either
    logprobs: int | None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class ChatBody(Body):
    adds_special_tokens = False
    messages: list[Any] | None = None
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


B = TypeVar("B", bound=Body)


def parse(kind: type[B], content: bytes) -> tuple[B, dict[str, Any]]:
    """A request's body, and its arguments for ``SamplingParams``.

    Raises ApiError (400) naming the parameter.
    """
    try:
        given = json.loads(content, object_pairs_hook=_each_name_once)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body must be a JSON object, it is {type(given).__name__}")
    given = {name: value for name, value in given.items() if value is not None}
    longest = given.pop("max_completion_tokens", given.get("max_tokens"))
    if longest is not None and given.setdefault("max_tokens", longest) != longest:
        raise ApiError(400, "max_tokens and max_completion_tokens are one setting with two values", param="max_tokens")
    sampling = {name: given.pop(name) for name in SAMPLING.intersection(given)}
    special = given.pop("add_special_tokens", kind.adds_special_tokens)
    if special is not kind.adds_special_tokens:
        reason = "as the trainer's, a chat's come from its template and a text's from the tokenizer"
        raise _unsupported("add_special_tokens", f"add_special_tokens={special!r:.80} is not supported: {reason}")
    for name in REFUSED.keys() & given.keys():
        harmless, reason = REFUSED[name]
        value = given.pop(name)
        if not any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in harmless):
            raise _unsupported(name, f"{name}={value!r:.80} is not supported: {reason}")
    for name in REFUSED_SAMPLING.keys() & given.keys():
        try:
            check_refused_sampling({name: given.pop(name)})
        except ValueError as error:
            raise _unsupported(name, str(error)) from None
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(kind, error) from None
    _check(body, sampling)
    return body, sampling


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ApiError for a name with two values, of which readers take the first or the last."""
    given = dict(pairs)
    if len(given) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ApiError(
            400,
            f"{twice!r:.80} is there twice in one object of the body; send it once",
            param=twice if twice.isprintable() else None,
        )
    return given


def _check(body: Body, sampling: Mapping[str, Any]) -> None:
    for name, limit in _MOST.items():
        if isinstance(sampling.get(name), list) and len(sampling[name]) > limit:
            raise ApiError(400, f"{name} holds {len(sampling[name])} items; at most {limit} are looked for", param=name)
    if isinstance(body, CompletionBody) and body.logprobs:
        raise _unsupported(
            "logprobs",
            f"logprobs={body.logprobs!s:.80} is not supported: the engine gives the exact log-probability of the "
            "sampled token only; use logprobs=0",
        )
    if body.stream and "prompt_logprobs" in sampling:
        raise ApiError(400, "prompt_logprobs comes with a whole answer; leave out stream", param="prompt_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream=true", param="stream_options")


def _unsupported(name: str, message: str) -> ApiError:
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _invalid(kind: type[Body], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, first["loc"])) or "the body"
    if first["type"] == "extra_forbidden":
        hint = _hint(kind, *map(str, first["loc"]))
        return ApiError(400, f"unknown parameter {name:.80}{hint}", param=name, code="unknown_parameter")
    return ApiError(400, f"{name}={first['input']!r:.80}: {first['msg'][0].lower()}{first['msg'][1:]}", param=name)


def _hint(kind: type[Body], *path: str) -> str:
    """The nearest of all parameters that a request may name there, and why it cannot be had if it is one of those."""
    *sections, name = path
    refused = {} if sections else {name: reason for name, (_, reason) in {**REFUSED, **REFUSED_SAMPLING}.items()}
    taken = StreamOptions.model_fields if sections else (*kind.model_fields, *SAMPLING, "max_completion_tokens")
    near = difflib.get_close_matches(name, sorted({*taken, *refused}), n=1)
    if not near:
        return ""
    why = f" It is not supported: {refused[near[0]]}" if near[0] in refused else ""
    return f"; did you mean {'.'.join([*sections, near[0]])}?{why}"
