"""Text while it comes: a beginning of the text at the end, whole characters, no part of a stop string."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout.requests.stop_strings import StopStringChecker
from vexact.serve.text import LiveText, TextReader, visible_forms


def byte_fallback_tokenizer() -> Any:
    """As of Llama 2: bytes are tokens of their own, and a run of them reads as characters only as a whole."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "he", "b", "é", "▁,"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def cleaning_tokenizer() -> Any:
    """Takes spaces back when punctuation follows."""
    words = ["[PAD]", "[UNK]", "the", "##s", "cat", ",", "do", "n", "'", "t", ".", "n't", "'s", "!"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", clean_up_tokenization_spaces=True
    )


TOKENIZERS = {"bytes": byte_tokenizer, "byte fallback": byte_fallback_tokenizer, "clean-up": cleaning_tokenizer}


def draw_tokens(tokenizer: Any, draw: random.Random) -> list[int]:
    """Whole characters, broken ones, words and special tokens."""
    ids: list[int] = []
    first_byte = tokenizer.get_vocab().get("<0x00>")
    for _ in range(draw.randint(1, 120)):
        if first_byte is not None and draw.random() < 0.4:
            ids += [first_byte + byte for byte in draw.choice("é€😀\n").encode()]
        elif first_byte is None and draw.random() < 0.6:
            ids += tokenizer(draw.choice(["é", "€", "😀", "a b", "the cat", "do n't ."]), add_special_tokens=False)[
                "input_ids"
            ]
        else:
            ids.append(draw.randrange(len(tokenizer)))
    return ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_was_shown_never_changes(kind: str) -> None:
    reader = TextReader(TOKENIZERS[kind]())
    draw = random.Random(0)
    for _ in range(60):
        ids, shown, taken = draw_tokens(reader.tokenizer, draw), "", 0
        live = LiveText(reader)
        whole = reader.decode(ids)
        while taken < len(ids):
            count = draw.choice([1, 1, 2, 30])
            shown += live.push(ids[taken : taken + count])
            taken += count
            assert whole.startswith(shown)
        assert len(whole) - len(shown) < 70
        assert shown + live.finish(whole) == whole


def test_text_is_shown_early_and_never_half_a_character() -> None:
    reader = TextReader(byte_tokenizer())
    live = LiveText(reader)
    pieces = [live.push([token]) for token in reader.tokenizer("a😀é")["input_ids"]]
    assert pieces == ["a", "", "", "", "😀", "", "é"]


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_good() -> None:
    reader = TextReader(byte_fallback_tokenizer())
    live = LiveText(reader)
    assert sum(len(live.push([3 + 0xFF])) for _ in range(500)) > 300
    assert len(live._window) < 300


@pytest.mark.parametrize(
    "stop", [["END"], ["aab"], ["<eos>"], ["x<eos>y"], ["b", "abc"], ["\n\n"], ["é€"], ["E", "END"]]
)
def test_no_part_of_a_stop_string_is_shown(stop: list[str]) -> None:
    reader = TextReader(byte_tokenizer())
    draw = random.Random(1)
    alphabet = "aabcxyEND<eos>\né€"
    for _ in range(150):
        ids = reader.tokenizer("".join(draw.choice(alphabet) for _ in range(40)), add_special_tokens=False)["input_ids"]
        for _ in range(3):
            ids.insert(draw.randrange(len(ids)), reader.tokenizer.eos_token_id)
        live, checker, shown = LiveText(reader, stop), StopStringChecker(reader.tokenizer, stop), ""
        text = reader.decode(ids)
        for token in ids:
            match = checker.push(token)
            if match is not None:
                text = match.text
                break
            shown += live.push([token])
        assert text.startswith(shown)
        assert shown + live.finish(text) == text


def test_forms_of_a_stop_string_with_special_tokens() -> None:
    assert visible_forms("a<s>b", ["<s>", "</s>"]) == {"a<s>b", "ab"}
    assert visible_forms("<s>", ["<s>"]) == {"<s>"}
    assert visible_forms("plain", []) == {"plain"}
    assert len(visible_forms("x" + "<s>" * 1000, ["<s>"])) == 2
