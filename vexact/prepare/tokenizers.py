"""Tokenizers built on the spot: one token per character for the arithmetic task, one per byte for everything else."""

from __future__ import annotations

from typing import Any

PAD, EOS = "<pad>", "<eos>"
_BYTE_LEVEL_SPACE = "\u0120"  # how a byte-level vocabulary spells a space
ARITHMETIC_CHARACTERS = "0123456789+-*=() "

# A single user message passes through as it is: "17+25=" stays six tokens long.
PLAIN_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def character_tokenizer(characters: str = ARITHMETIC_CHARACTERS) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token per character; anything else becomes the padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return _wrap(core, PLAIN_CHAT_TEMPLATE)


def byte_tokenizer(vocab_size: int | None = None) -> Any:
    """A ``PreTrainedTokenizerFast`` with one token per UTF-8 byte (no merges), so that any text can be encoded.

    Up to ``vocab_size`` ids follow that encoding never yields and that decode to `` 258``, `` 259``, …: whatever a
    model with a large vocabulary samples is text. A smaller ``vocab_size`` adds none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"{_BYTE_LEVEL_SPACE}{index}" for index in range(len(tokens), vocab_size or 0)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _wrap(core, BYTE_CHAT_TEMPLATE)


def _wrap(core: Any, chat_template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer
