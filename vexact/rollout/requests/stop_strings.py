"""Stop strings: noticed by a short decode after every token, confirmed and cut by one full decode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

INCOMPLETE = "\ufffd"  # what a tokenizer prints for bytes that are no character, or not one yet
_CONTEXT = 4  # characters before a token that fix how it reads: with a space before it, or as the rest of a character
_MAX_BYTES = 4  # of a UTF-8 character, hence the most tokens it spans
_MAX_WINDOW = 2 * _MAX_BYTES * (_CONTEXT + 1)  # tokens


class Tokenizer(Protocol):
    """The one method of a tokenizer the engine needs. ``added_tokens_decoder`` and ``eos_token_id`` are used if it has
    them."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = ...) -> Any: ...


class StopMatch(NamedTuple):
    """A found stop string and the text before it."""

    stop: str
    text: str


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text to id of the tokens that ``skip_special_tokens`` leaves out; empty if the tokenizer does not tell."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token.content: index for index, token in added.items() if token.special}


class StopStringChecker:
    """The stop strings of one request. ``push`` decodes a few tokens (at most ``_MAX_WINDOW``), however long the output
    and the stop strings; a second time if a stop string holds a special token and more.

    A stop string is looked for in the response as ``Sample.text`` shows it, without special tokens. One that is, or
    holds, the text of a special token also matches that token. Of several that are complete after a token the one that
    starts first wins, then the shorter.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], specials: Mapping[str, int] | None = None) -> None:
        """``specials``: ``special_tokens(tokenizer)``, for callers with many requests."""
        specials = special_tokens(tokenizer) if specials is None else specials
        special_ids = frozenset(specials.values())
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._stop = tuple(stop)
        self._by_token = {specials[string]: string for string in self._stop if string in specials}
        self._spanning = tuple(s for s in self._stop if s not in specials and any(text in s for text in specials))
        self._token_ids: list[int] = []
        self._tail = _Tail(tokenizer, self._stop, unseen=special_ids)
        self._tail_with_specials = _Tail(tokenizer, self._spanning) if self._spanning else None

    def push(self, token_id: int) -> StopMatch | None:
        """Add one sampled token; return the first stop string that the text now contains."""
        self._token_ids.append(token_id)
        found: list[StopMatch] = []
        if token_id in self._by_token:
            found.append(StopMatch(self._by_token[token_id], self._decode(self._token_ids[:-1])))
        if self._tail.push(token_id):
            text = self._decode(self._token_ids)
            found += [StopMatch(stop, text[:start]) for start, stop in _occurrences(text, self._stop)]
        if self._tail_with_specials is not None and self._tail_with_specials.push(token_id):
            text = self._decode(self._token_ids, skip_special_tokens=False)
            found += [StopMatch(stop, self._before(text[:start])) for start, stop in _occurrences(text, self._spanning)]
        return min(found, key=lambda match: (len(match.text), len(match.stop)), default=None)

    def _before(self, shown: str) -> str:
        """The beginning ``shown`` of the text with special tokens, without them."""
        count = len(self._token_ids)
        while not shown.startswith(whole := self._decode(self._token_ids[:count], skip_special_tokens=False)):
            count -= 1
        rest = "" if self._token_ids[count] in self._special_ids else shown[len(whole) :]
        return self._decode(self._token_ids[:count]) + rest

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return _decode(self._tokenizer, token_ids, skip_special_tokens)


class _Tail:
    """The end of a response as text, long enough for every stop string: some text, then tokens that may still change.

    A stop string is never missed, but one may be seen that a full decode does not have: decoders look at neighbours.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], unseen: frozenset[int] | None = None) -> None:
        """``unseen``: tokens that print nothing, because special tokens are left out; None prints special tokens."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._unseen: frozenset[int] = unseen or frozenset()
        self._skip_special_tokens = unseen is not None
        self._longest = max(map(len, stop))
        self._head = ""  # text before the window
        self._window: list[int] = []
        self._text = ""  # of the window
        self._num_unfinished = 0  # tokens since the text last ended with a whole character

    def push(self, token_id: int) -> bool:
        """Add one token; whether a stop string is in sight."""
        if token_id in self._unseen:
            return False
        text = self._decode([*self._window, token_id])
        if text and text == self._text and not text.endswith(INCOMPLETE):
            return False  # a token without text, such as a row of the embedding that no token uses
        self._window.append(token_id)
        self._text = text
        self._num_unfinished = self._num_unfinished + 1 if text.endswith(INCOMPLETE) else 0
        seen = self._head + text
        if len(text) > 2 * _CONTEXT or len(self._window) > _MAX_WINDOW:
            self._trim()
        return any(string in seen for string in self._stop)

    def _trim(self) -> None:
        """Drop about half of the window, where the rest still reads the same: not inside a character.

        Bytes that went on for longer than a character without ending one are none, and may be cut anywhere.
        """
        middle = len(self._window) // 2
        unreadable = self._num_unfinished > _MAX_BYTES
        if unreadable or not self._num_unfinished:
            for start in range(middle, max(0, middle - _MAX_BYTES), -1):
                text = self._decode(self._window[start:])
                if len(text) >= _CONTEXT and (unreadable or self._text.endswith(text)):
                    self._cut(start, text)
                    return
        if len(self._window) > _MAX_WINDOW:
            self._cut(middle, self._decode(self._window[middle:]))

    def _cut(self, start: int, text: str) -> None:
        """Let the window begin at its token ``start``; it then reads ``text``."""
        dropped = self._text[: max(0, len(self._text) - len(text))]
        self._head = (self._head + dropped)[-self._longest :]
        self._window, self._text = self._window[start:], text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return _decode(self._tokenizer, token_ids, self._skip_special_tokens)


def _occurrences(text: str, stop: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(start, stop string) of the first place of each stop string in ``text``."""
    for string in stop:
        if (start := text.find(string)) >= 0:
            yield start, string


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
    if not token_ids:
        return ""
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)
    return text
