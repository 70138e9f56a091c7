"""Small real tokenizers whose decoders differ in what a token's neighbours do to its text."""

from __future__ import annotations

from functools import cache

from vexact.prepare.tokenizers import byte_tokenizer

TURN, TOOL = "<|im_end|>", "<|tool▁call|>"


@cache
def byte_level():
    """One token per byte, tokens of several bytes that split characters, and two special tokens."""
    tokenizer = byte_tokenizer(300)
    tokenizer.add_special_tokens({"extra_special_tokens": [TURN, TOOL]})
    return tokenizer


@cache
def byte_merges():
    """Byte-level BPE whose merges cross the borders of characters: one token ends a character and begins the next."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = {bytes([b]): c for b, c in zip(_bytes_of_alphabet(), _alphabet_in_byte_order())}
    text = "日本日".encode()
    pieces = ["".join(spell[bytes([b])] for b in text[i:j]) for i, j in ((1, 4), (2, 4), (2, 7), (0, 2))]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*alphabet, *pieces])}, merges=[]))
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def _bytes_of_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [b for b in range(256) if b not in printable]


def _alphabet_in_byte_order():
    printable = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    return printable + [chr(256 + i) for i in range(256 - len(printable))]


@cache
def sentencepiece_like():
    """Llama 2's decoder: words begin with a space that the first one loses; bytes join to characters or to none."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["▁a", "▁b", "a", "b", "▁", "END", "▁END", "日", "."]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    core = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
