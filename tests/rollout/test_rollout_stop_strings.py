"""Incremental stop strings against a full decode after every token."""

import random

from rollout_models import LetterTokenizer, Utf8Tokenizer

from vexact.rollout.stop_strings import StopStringChecker


def first_match(tokenizer, stop, tokens):
    """Brute force: the number of tokens after which a stop string shows, and the text before it."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True).rstrip("\ufffd")
        hits = [text.find(string) for string in stop if string in text]
        if hits:
            return count, text[: min(hits)]
    return None


def incremental(tokenizer, stop, tokens):
    checker = StopStringChecker(tokenizer, stop)
    for count, token in enumerate(tokens, start=1):
        match = checker.push(token)
        if match is not None:
            return count, match.text
    return None


def test_random_letters_match_a_full_decode():
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        tokens = [rng.choice([0, 1, 2, 95]) for _ in range(rng.randint(1, 40))]
        stop = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        want = first_match(LetterTokenizer(), stop, tokens)
        found += want is not None
        assert incremental(LetterTokenizer(), stop, tokens) == want
    assert 50 < found < 300


def test_characters_that_span_tokens():
    tokens = list("naïve 日本 ok".encode())
    for stop in (["ï"], ["日本"], ["本 o"], ["zzz"], ["e 日"]):
        assert incremental(Utf8Tokenizer(), stop, tokens) == first_match(Utf8Tokenizer(), stop, tokens)


def test_the_earliest_of_two_stop_strings_cuts():
    checker = StopStringChecker(LetterTokenizer(), ["cd", "bc"])
    assert [checker.push(token) for token in (0, 1)] == [None, None]
    match = checker.push(2)
    assert match == ("bc", "a")
