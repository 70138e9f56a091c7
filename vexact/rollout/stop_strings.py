"""Incremental detokenisation, just enough to notice a stop string as soon as it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

INCOMPLETE = "\ufffd"  # what a tokenizer prints for the first bytes of an unfinished character


class Tokenizer(Protocol):
    """The one method of a tokenizer the engine uses."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = ...) -> Any: ...


class StopMatch(NamedTuple):
    """A found stop string and the text before it."""

    stop: str
    text: str


class StopStringChecker:
    """Text of one request's output so far; ``push`` costs two short decodes, whatever the length of the output."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._overlap = max(map(len, self._stop)) - 1
        self._window: list[int] = []  # last emitted tokens (they fix spacing) followed by those not emitted yet
        self._num_emitted = 0  # how many tokens of the window are in _text already
        self._text = ""

    def push(self, token_id: int) -> StopMatch | None:
        """Add one sampled token; return the first stop string that the text now contains."""
        self._window.append(token_id)
        emitted = self._decode(self._window[: self._num_emitted])
        fresh = self._decode(self._window)[len(emitted) :]
        searched_from = max(0, len(self._text) - self._overlap)
        text = self._text + fresh.rstrip(INCOMPLETE)
        if fresh and not fresh.endswith(INCOMPLETE):
            self._text = text
            self._window = self._window[self._num_emitted :]
            self._num_emitted = len(self._window)
        return self._find(text, searched_from)

    def _find(self, text: str, start: int) -> StopMatch | None:
        found = [(index, stop) for stop in self._stop if (index := text.find(stop, start)) >= 0]
        if not found:
            return None
        index, stop = min(found, key=lambda pair: pair[0])
        return StopMatch(stop, text[:index])

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""
