"""Which characters of a text each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what part of a character decodes to
_MOST_CHARACTERS = 8  # of a token that does not read by itself as it does in the text
_MOST_TOKENS = 16  # that make one character; more are bytes that make none


class TokenText:
    """Splits texts by their tokens; decodes every token once, those of a character that several make together."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode``: token ids to text."""
        self.decode = decode
        self._texts: dict[tuple[int, bool], str] = {}
        self._before: int | None = None  # a token for others to come after: many decoders then give a word its space

    def lengths(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Characters (Unicode code points) of ``text`` per token; they add up to all of it.

        A token that the text leaves out, such as one that ended it, has none; of tokens that only together make a
        character, the last has it.

        >>> words = {1: "two", 2: " words", 3: "<end>"}
        >>> TokenText(lambda ids: "".join(words[i] for i in ids)).lengths([1, 2, 3], "two words")
        [3, 6, 0]
        """
        lengths, done, num_missing = [0] * len(token_ids), 0, 0
        group: list[int] = []  # tokens that end inside a character
        num_read = 0  # characters of the group that are done
        for place, token_id in enumerate(token_ids):
            group.append(token_id)
            read = self._read(group, is_first=place + 1 == len(group))
            whole = read.rstrip(_INCOMPLETE) if len(group) < _MOST_TOKENS else read
            new = whole[num_read:]
            if text.startswith(new, done):
                lengths[place] = len(new)
                done, num_read = done + len(new), num_read + len(new)
                num_missing = 0 if new else num_missing
                if whole == read:
                    self._remember(group)
                    group, num_read = [], 0
                continue
            alone = self._read([token_id], is_first=place == 0)
            is_part = _INCOMPLETE in alone
            group, num_read = [token_id] if is_part else [], 0
            start = -1 if is_part else text.find(alone, done, done + len(alone) + _MOST_CHARACTERS * (num_missing + 1))
            if start < 0 or (start > done and not num_missing and not text[done:start].isspace()):
                num_missing += 1
                continue
            if num_missing and start > done:  # what lies between is of the tokens before
                lengths[place - 1] += start - done
                done = start
            lengths[place] = start + len(alone) - done
            done, num_missing = start + len(alone), 0
        if lengths:
            lengths[-1] += len(text) - done
        return lengths

    def _read(self, group: Sequence[int], *, is_first: bool) -> str:
        """What these tokens say, at the beginning of a text or after other tokens."""
        after = not is_first and self._before is not None
        if len(group) > 1:
            return self._decode(group, after)
        key = group[0], after
        if key not in self._texts:
            self._texts[key] = self._decode(group, after)
        return self._texts[key]

    def _decode(self, group: Sequence[int], after: bool) -> str:
        if after and self._before is not None:
            before, both = self.decode([self._before]), self.decode([self._before, *group])
            if both.startswith(before):
                return both[len(before) :]
        return self.decode(list(group))

    def _remember(self, group: Sequence[int]) -> None:
        if self._before is None and len(group) == 1 and self.decode(list(group)).isalnum():
            self._before = group[0]
