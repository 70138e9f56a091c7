"""Stop strings, token by token, against a search in a full decode after every token."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_models import LetterTokenizer, Utf8Tokenizer
from stop_tokenizers import TOOL, TURN, byte_level, byte_merges, sentencepiece_like

from vexact.rollout.requests.stop_strings import StopStringChecker, special_tokens


def first_match(tokenizer, stop, tokens):
    """Brute force: the number of tokens after which a stop string shows, and the text before it (None where special
    tokens are part of the stop string: see ``test_text_before_a_stop_string_with_special_tokens``)."""
    specials = special_tokens(tokenizer)
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        hits = [text.find(string) for string in stop if string in text]
        if hits:
            return count, text[: min(hits)]
        shown = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        if any(string in shown for string in stop if any(token in string for token in specials)):
            return count, None
    return None


def incremental(tokenizer, stop, tokens):
    checker = StopStringChecker(tokenizer, stop)
    for count, token in enumerate(tokens, start=1):
        match = checker.push(token)
        if match is not None:
            return count, match.text
    return None


def agree(tokenizer, stop, tokens):
    want, got = first_match(tokenizer, stop, tokens), incremental(tokenizer, stop, tokens)
    if want is None or got is None or want[1] is not None:
        assert got == want
    else:
        assert got[0] == want[0]


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


@cache
def pools():
    """Name to (tokenizer, tokens worth mixing, stop strings worth looking for)."""
    plain, merged, pieces = byte_level(), byte_merges(), sentencepiece_like()
    characters = plain.encode("日本é ab", add_special_tokens=False)
    fallback = ids_of(pieces, "<0xE6>", "<0x97>", "<0xA5>", "<0xFF>", "<s>", "</s>")
    return {
        "letters": (LetterTokenizer(), [0, 1, 2, 95], ["a", "bc", "abc", "cab", "abcab"]),
        "bytes": (
            plain,
            [*characters, *ids_of(plain, TURN, TOOL, "<eos>"), 280, 10**6],
            ["日", "é", " a", "日本", "本ab", TURN, f"a{TURN}", f"{TURN}b", f"é{TOOL}a", f"<eos>{TURN}", "a" * 9],
        ),
        "merges": (
            merged,
            [*merged.encode("日本ab"), *[*range(256, 260)] * 3],
            ["日", "本", "日日", "ab", "a日", "本a", "日本日本"],
        ),
        "pieces": (
            pieces,
            [*range(259, 268), *fallback],
            ["日", "日日", " a", " b", "a b", "END", " END", "b.", "  ", "a</s>", "</s>", "</s> b"],
        ),
    }


@pytest.mark.parametrize("name", ["letters", "bytes", "merges", "pieces"])
@given(data=st.data())
@settings(max_examples=150)
def test_every_prefix_matches_a_full_decode(name, data):
    tokenizer, pool, strings = pools()[name]
    tokens = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=60))
    stop = data.draw(st.lists(st.sampled_from(strings), min_size=1, max_size=3, unique=True))
    agree(tokenizer, stop, tokens)


@given(data=st.data())
@settings(max_examples=40)
def test_characters_spelt_in_bytes_go_on_reading_right(data):
    """A byte run must not be cut inside a character: the decoder joins all of it or nothing."""
    tokenizer = sentencepiece_like()
    character = ids_of(tokenizer, "<0xE6>", "<0x97>", "<0xA5>")
    parts = data.draw(st.lists(st.one_of(st.just(character), st.integers(259, 267).map(lambda i: [i])), min_size=30))
    tokens = [token for part in parts for token in part]
    for stop in (["日END"], ["日日日日日 a"], ["a日日b"], ["." + "日" * 12]):
        agree(tokenizer, stop, tokens)


def test_characters_that_span_tokens():
    tokens = list("naïve 日本 ok".encode())
    for stop in (["ï"], ["日本"], ["本 o"], ["zzz"], ["e 日"]):
        agree(Utf8Tokenizer(), stop, tokens)


def test_a_stop_string_longer_than_the_window():
    text = "".join(chr(97 + i % 23) for i in range(300))
    tokens = [ord(c) - 97 for c in text]
    for stop in (text[100:250], text[1:], text[299:]):
        agree(LetterTokenizer(), [stop], tokens)


class CountingTokenizer:
    def __init__(self, tokenizer):
        self._tokenizer, self.added_tokens_decoder, self.longest = tokenizer, tokenizer.added_tokens_decoder, 0

    def decode(self, token_ids, skip_special_tokens=False):
        self.longest = max(self.longest, len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("stop", ["\n", "</answer>", "x" * 200])
@pytest.mark.parametrize(
    "what", ["continuation bytes", "first bytes", "special tokens", "rows without a token", "text"]
)
def test_a_push_decodes_few_tokens_whatever_came_before(what, stop):
    first, *_, last = byte_level().encode("日", add_special_tokens=False)
    run = {
        "continuation bytes": [last],
        "first bytes": [first],
        "special tokens": ids_of(byte_level(), TURN),
        "rows without a token": [10**6],
        "text": byte_level().encode("Grüße! ", add_special_tokens=False),
    }[what]
    tokenizer = CountingTokenizer(byte_level())
    checker = StopStringChecker(tokenizer, [stop])
    assert not any(checker.push(run[i % len(run)]) for i in range(500))
    assert tokenizer.longest <= 48
    found = [checker.push(token) for token in byte_level().encode(stop, add_special_tokens=False)]
    assert found[-1].stop == stop


def test_runs_that_end_characters_only_to_begin_others_stay_short():
    """Every one of these tokens leaves the text with an unfinished character."""
    tokenizer = CountingTokenizer(byte_merges())
    checker = StopStringChecker(tokenizer, ["zz"])
    assert not any(checker.push(256) for _ in range(500))
    assert tokenizer.longest <= 48


@pytest.mark.parametrize(
    ("stop", "tokens", "want"),
    [
        (["cd", "bc"], [0, 1, 2], ("bc", "a")),  # the earliest wins
        (["ab", "a"], [0], ("a", "")),
        (["cab", "ab"], [2, 0, 1], ("cab", "")),
    ],
)
def test_which_stop_string_wins(stop, tokens, want):
    checker = StopStringChecker(LetterTokenizer(), stop)
    assert [checker.push(token) for token in tokens][-1] == want


class WordTokenizer:
    """Every token is a word."""

    words = ("ab", "xENDy", "bcd", "E", "ND")

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(self.words[token] for token in token_ids)


@pytest.mark.parametrize(
    ("stop", "tokens", "want"),
    [
        (["a", "ab"], [0], ("a", "")),  # both start at once: the shorter
        (["END"], [0, 1], ("END", "abx")),  # it starts and ends inside one token
        (["c", "bcd"], [0, 2], ("bcd", "ab")),  # the earliest start, not the first end
        (["END"], [0, 3, 4], ("END", "ab")),
    ],
)
def test_several_characters_at_once(stop, tokens, want):
    checker = StopStringChecker(WordTokenizer(), stop)
    *before, match = [checker.push(token) for token in tokens]
    assert match == want
    assert not any(before)


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        (f"ab{TURN}", TURN, "ab"),
        (f"a{TURN}b\n{TURN}", f"\n{TURN}", "ab"),
        (f"a{TOOL}b{TURN}c", f"b{TURN}c", "a"),
        (f"é日{TURN}{TOOL}", f"{TURN}{TOOL}", "é日"),
        (f"日{TOOL}日", f"{TOOL}日", "日"),
        (f"x{TOOL}{TURN}", f"|>{TURN}", "x"),
    ],
)
def test_text_before_a_stop_string_with_special_tokens(text, stop, before):
    tokenizer = byte_level()
    checker = StopStringChecker(tokenizer, ["nothing", stop])
    *earlier, match = [checker.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert match == (stop, before)
    assert not any(earlier)


def test_a_special_token_spelt_out_matches_too():
    tokenizer = byte_level()
    spelt = [tokenizer.encode(character, add_special_tokens=False)[0] for character in TURN]
    assert len(spelt) == len(TURN)
    assert incremental(tokenizer, [TURN], [*spelt, 5]) == (len(TURN), "")
