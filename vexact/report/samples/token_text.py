"""Which characters of a text each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what part of a character decodes to
_MOST_CHARACTERS = 8  # of a token that does not read alone as it does in the text


class TokenText:
    """Splits texts by their tokens; decodes every token once."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode``: token ids to text."""
        self.decode = decode
        self._alone: dict[int, str] = {}

    def lengths(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Characters (Unicode code points) of ``text`` per token; they add up to all of it.

        A token that the text leaves out, such as one that ended it, has none; of tokens that only together make a
        character, the last has it.

        >>> words = {1: "two", 2: " words", 3: "<end>"}
        >>> TokenText(lambda ids: "".join(words[i] for i in ids)).lengths([1, 2, 3], "two words")
        [3, 6, 0]
        """
        lengths, done, waiting = [0] * len(token_ids), 0, 0
        for place, token_id in enumerate(token_ids):
            alone = self._text(token_id)
            whole = bool(alone) and _INCOMPLETE not in alone
            reach = done + len(alone) + _MOST_CHARACTERS * (waiting + 1)
            start = text.find(alone, done, reach) if whole else -1
            if start < 0 or (start > done and not waiting and not text[done:start].isspace()):
                waiting += 1
                continue
            if waiting and start > done:  # what lies between is of the tokens before
                lengths[place - 1] += start - done
                done = start
            lengths[place] = start + len(alone) - done
            done, waiting = start + len(alone), 0
        if lengths:
            lengths[-1] += len(text) - done
        return lengths

    def _text(self, token_id: int) -> str:
        text = self._alone.get(token_id)
        if text is None:
            text = self._alone[token_id] = self.decode([token_id])
        return text
