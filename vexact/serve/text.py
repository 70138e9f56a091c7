"""Tokens to text while they come: what is shown never changes afterwards, and adds up to ``Sample.text``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from string import ascii_letters

from vexact.rollout.requests.stop_strings import INCOMPLETE, Tokenizer, special_tokens

_CONTEXT = 8  # characters before a token that fix how it reads
_UNSETTLED = 4  # trailing U+FFFD that may still become a character; so many characters may a clean-up rewrite
_MAX_WINDOW = 64  # tokens decoded at once
_MAX_SPECIALS = 4  # in a stop string, each of which may be seen or not
# GPT-2's characters for bytes: printable ones stand for themselves, the others come after the first 256
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextReader:
    """A tokenizer and what has to be known of it to show text early. Shared by all requests of one event loop."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.specials = special_tokens(tokenizer)
        self.special_ids = frozenset(self.specials.values())
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        # a run of such tokens reads as characters only if all of it does, so none of it is settled before its end
        self.byte_ids = {index: int(text[3:5], 16) for text, index in vocabulary.items() if _BYTE_TOKEN.fullmatch(text)}
        self.cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._before = self._letter(vocabulary)
        self._texts: dict[tuple[int, bool], str] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)) if token_ids else ""

    def token_text(self, token_id: int, *, is_first: bool = False) -> str:
        """What one token writes, at the beginning of a text or after other text: many decoders give a word its space
        in the latter case only. Special tokens by their names."""
        key = token_id, is_first
        if key not in self._texts:
            self._texts[key] = self._read(token_id, is_first)
        return self._texts[key]

    def _read(self, token_id: int, is_first: bool) -> str:
        alone = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        if is_first or self._before is None or token_id in self.special_ids or INCOMPLETE in alone:
            return alone
        letter = self.decode([self._before])
        both = self.decode([self._before, token_id])
        return both.removeprefix(letter) if both.startswith(letter) else alone

    def _letter(self, vocabulary: dict[str, int]) -> int | None:
        """A token that is one letter, for others to come after."""
        letters = (vocabulary[letter] for letter in ascii_letters if letter in vocabulary)
        return next((one for one in letters if self.decode([one]) in ascii_letters), None)

    def token_bytes(self, token_id: int, text: str) -> list[int] | None:
        """The bytes of a token of this text, which add up to characters where the token is a part of one; None if they
        are not known."""
        if token_id in self.byte_ids:
            return [self.byte_ids[token_id]]
        if INCOMPLETE not in text:
            return list(text.encode())
        spelt = self._spelt(token_id)
        return list(spelt) if spelt is not None and spelt.decode(errors="replace") == text else None

    def _spelt(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for in a byte-level vocabulary."""
        piece = getattr(self.tokenizer, "convert_ids_to_tokens", lambda _: None)(token_id)
        if not isinstance(piece, str) or not all(character in _BYTE_LEVEL for character in piece):
            return None
        return bytes(_BYTE_LEVEL[character] for character in piece)


class TokenTexts:
    """The tokens of one sample as text: what each writes, and where in the sample's text it begins, were that not cut
    before a stop string."""

    def __init__(self, reader: TextReader) -> None:
        self._reader = reader
        self._so_far = LiveText(reader)

    def push(self, token_ids: Iterable[int]) -> tuple[list[str], list[int]]:
        """Of these tokens, which come next, the texts and the numbers of characters before them."""
        texts, offsets = [], []
        for token_id in token_ids:
            before = self._so_far.num_shown
            text = self._reader.token_text(token_id, is_first=self._so_far.is_empty)
            new = self._so_far.push([token_id])  # bytes before the token may turn out to be no character now
            texts.append(text)
            offsets.append(before + len(new) - len(text) if new.endswith(text) else before)
        return texts, offsets


class LiveText:
    """The text of one sample, a piece at a time. A piece never ends inside a character, and never holds the beginning
    of a stop string before it is clear that it is none. What was shown stands, but for a run of more than
    ``_MAX_WINDOW`` byte tokens that turns out to be no text."""

    def __init__(self, reader: TextReader, stop: Iterable[str] = ()) -> None:
        self._reader = reader
        self._stop = sorted({form for string in stop for form in visible_forms(string, reader.specials)})
        self._window: list[int] = []
        self._done = 0  # characters of the window's text that are settled
        self._held = ""  # settled, but maybe the beginning of a stop string
        self._num_shown = 0

    @property
    def num_shown(self) -> int:
        """Characters."""
        return self._num_shown

    @property
    def is_empty(self) -> bool:
        """Whether no token has come that text may hold."""
        return not self._window

    def push(self, token_ids: Iterable[int]) -> str:
        """What can be shown now that these tokens have come, and that no stop string ended the sample."""
        for token_id in token_ids:
            if token_id not in self._reader.special_ids:
                self._window.append(token_id)
        text = self._reader.decode(self._window)
        settled = self._settled(text)
        if settled > self._done:
            self._held += text[self._done : settled]
            self._done = settled
        self._trim(text)
        return self._show(len(self._held) - self._num_kept())

    def finish(self, text: str) -> str:
        """The rest of the sample's ``text``."""
        return text[self._num_shown :]

    def _settled(self, text: str) -> int:
        """Characters of ``text`` that no further token can change."""
        length = len(text)
        if self._window and self._window[-1] in self._reader.byte_ids and len(self._window) < _MAX_WINDOW:
            run = len(self._window)
            while run and self._window[run - 1] in self._reader.byte_ids:
                run -= 1
            length = len(self._reader.decode(self._window[:run]))
        for _ in range(_UNSETTLED):
            if length and text[length - 1] == INCOMPLETE:
                length -= 1
        return max(0, length - _UNSETTLED) if self._reader.cleans_up else length

    def _trim(self, text: str) -> None:
        """Drops the beginning of a long window where the rest still reads the same and the dropped part is settled."""
        size = len(self._window)
        for start in range(size // 2, size - 1 if size > _MAX_WINDOW // 2 else 0):
            rest = self._reader.decode(self._window[start:])
            dropped = len(text) - len(rest)
            if dropped > self._done - _CONTEXT and size <= 2 * _MAX_WINDOW:
                return
            if text.endswith(rest) or size > 4 * _MAX_WINDOW:
                self._window, self._done = self._window[start:], max(0, self._done - dropped)
                return

    def _num_kept(self) -> int:
        """Length of the longest end of what is held that begins a stop string."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[len(self._held) - length :]
            if any(string.startswith(end) for string in self._stop):
                return length
        return 0

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        self._num_shown += len(shown)
        return shown


def visible_forms(stop: str, specials: Iterable[str]) -> set[str]:
    """How a stop string may look in a text that leaves special tokens out: each of them is there as plain characters,
    or is not. Of a string with many, all and none."""
    names = sorted(specials, key=len, reverse=True)
    if not names:
        return {stop}
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", stop)
    if len(pieces) // 2 > _MAX_SPECIALS:
        return {stop, "".join(pieces[::2])} - {""}
    forms = {""}
    for number, piece in enumerate(pieces):
        forms = {form + shown for form in forms for shown in ((piece, "") if number % 2 else (piece,))}
    return forms - {""}
