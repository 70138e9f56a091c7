"""Answers in OpenAI's form, whole and in chunks. Token ids stand where vLLM puts them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vexact.rollout.stream import Delta
from vexact.serve.prompts import Job
from vexact.serve.protocol import Body, ChatBody
from vexact.serve.text import LiveText, TextReader, TokenTexts
from vexact.types import Sample


@dataclass(slots=True)
class Answer:
    """Builds one request's answer from the deltas of its samples."""

    body: Body
    job: Job
    model: str
    reader: TextReader | None
    created: int = field(default_factory=lambda: int(time.time()))
    num_completion_tokens: int = 0
    _texts: dict[int, LiveText] = field(default_factory=dict)
    _tokens: dict[int, TokenTexts] = field(default_factory=dict)  # by choice
    _begun: set[int] = field(default_factory=set)

    def whole(self, choices: dict[int, Delta]) -> dict[str, Any]:
        """The answer to a request that is not streamed; ``choices`` have their samples."""
        told = [self._whole_choice(choices[index]) for index in sorted(choices)]
        self.num_completion_tokens = sum(len(delta.token_ids) for delta in choices.values())
        extra: dict[str, Any] = {}
        if self._is_chat and self.body.return_token_ids:
            extra = {"prompt_token_ids": list(self.job.asks[0].prompt_token_ids)}
        if self._is_chat:
            extra |= self._prompt_logprobs(choices[min(choices)])
        return self._envelope(told, "") | {"usage": self.usage()} | extra

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """What a stream sends for this delta: for a chat's first one the role before it."""
        index = delta.index
        self.num_completion_tokens += len(delta.token_ids)
        first = index not in self._begun
        if first:
            self._begun.add(index)
            self._texts[index] = LiveText(self.reader, self.job.stop) if self.reader else _NoText()
            if self._is_chat:
                yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, first)
        if delta.sample is None:
            text = self._texts[index].push(delta.token_ids)
        else:  # its last tokens may be a stop string's, which are not shown
            text = self._texts.pop(index).finish(delta.sample.text or "")
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._is_chat else {"text": text}
        if self.body.wants_logprobs and delta.token_ids:
            said["logprobs"] = self._logprobs(delta)
        if self.body.return_token_ids:
            said["token_ids"] = delta.token_ids
        if delta.sample is not None:
            said |= self._ending(delta.sample)
        if text or delta.sample is not None or "logprobs" in said or "token_ids" in said:
            yield self._chunk(index, said, first and not self._is_chat)

    def last_chunk(self) -> dict[str, Any]:
        """The usage of the whole request."""
        return self._envelope([], ".chunk") | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        prompt, completion = self.job.num_prompt_tokens, self.num_completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    @property
    def _is_chat(self) -> bool:
        return isinstance(self.body, ChatBody)

    def _envelope(self, choices: list[dict[str, Any]], part: str) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self._is_chat else "text_completion"
        return {"id": self.job.name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _whole_choice(self, delta: Delta) -> dict[str, Any]:
        sample = delta.sample
        assert sample is not None
        choice: dict[str, Any] = {
            "index": delta.index,
            "logprobs": self._logprobs(delta) if self.body.wants_logprobs else None,
            **self._ending(sample),
        }
        text = sample.text or ""
        choice |= {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        if self.body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if not self._is_chat:
                choice["prompt_token_ids"] = list(sample.prompt_token_ids)
        if not self._is_chat:
            choice |= self._prompt_logprobs(delta)
        return choice

    def _ending(self, sample: Sample) -> dict[str, Any]:
        return {"finish_reason": sample.finish_reason, "stop_reason": self.job.stop_reason(sample)}

    def _chunk(self, index: int, said: dict[str, Any], with_prompt: bool) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None} | said
        chunk = self._envelope([choice], ".chunk")
        if with_prompt and self.body.return_token_ids:
            prompt = list(self.job.asks[index // self.job.num_samples].prompt_token_ids)
            (chunk if self._is_chat else choice)["prompt_token_ids"] = prompt
        return chunk | {"usage": None} if self.body.wants_usage else chunk

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        tokens, offsets = self._token_texts(delta)
        if self._is_chat:
            return {"content": [self._told(*each) for each in zip(delta.token_ids, tokens, delta.logprobs)]}
        return {"tokens": tokens, "token_logprobs": delta.logprobs, "top_logprobs": None, "text_offset": offsets}

    def _token_texts(self, delta: Delta) -> tuple[list[str], list[int]]:
        """Without a tokenizer there is no text, and every token begins at its beginning."""
        if self.reader is None:
            return [f"token_id:{one}" for one in delta.token_ids], [0] * len(delta.token_ids)
        if delta.index not in self._tokens:
            self._tokens[delta.index] = TokenTexts(self.reader)
        return self._tokens[delta.index].push(delta.token_ids)

    def _prompt_logprobs(self, delta: Delta) -> dict[str, Any]:
        """As vLLM's: None for the first token, which nothing precedes; empty if nobody asked."""
        sample = delta.sample
        if sample is None or sample.prompt_logprobs is None:
            return {}
        told: list[dict[str, Any] | None] = [None]
        for token_id, logprob in zip(sample.prompt_token_ids[1:], sample.prompt_logprobs.tolist()):
            text = self.reader.token_text(token_id) if self.reader else None
            told.append({str(token_id): {"logprob": logprob, "decoded_token": text}})
        return {"prompt_logprobs": told}

    def _told(self, token_id: int, token: str, logprob: float) -> dict[str, Any]:
        content = self.reader.token_bytes(token_id, token) if self.reader else None
        return {"token": token, "logprob": logprob, "bytes": content, "top_logprobs": []}


class _NoText(LiveText):
    """Of a model without a tokenizer."""

    def __init__(self) -> None: ...

    def push(self, token_ids: object) -> str:
        return ""

    def finish(self, text: str) -> str:
        return text
