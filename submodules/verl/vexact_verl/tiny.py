"""``python -m vexact_verl.tiny [DIR]``: the model and data of ``vexact prepare tiny`` for verl; prints where they are.

verl's agent loop asks the tokenizer of every Qwen3 for ``<|im_end|>``, and for a line break as one token. The tiny
model's has neither, but its vocabulary has room.
"""

from __future__ import annotations

import sys
from pathlib import Path

LINE_BREAK, TURN_END = "\n", "<|im_end|>"


def write_tiny(directory: Path | None = None) -> Path:
    """Doing it twice does nothing. Raises ValueError when ``directory`` holds something else."""
    from vexact.prepare import prepare

    where = prepare("tiny", directory)
    add_chat_tokens(where / "model")
    return where


def add_chat_tokens(model: Path) -> None:
    """Adds the two tokens to the tokenizer beside a model, below the model's vocabulary size."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.add_tokens([LINE_BREAK]) + tokenizer.add_special_tokens({"extra_special_tokens": [TURN_END]}):
        return
    room = AutoConfig.from_pretrained(model).vocab_size
    if len(tokenizer) > room:
        raise ValueError(f"{model}: two more tokens do not fit into a vocabulary of {room}")
    tokenizer.save_pretrained(model)


if __name__ == "__main__":
    sys.stdout.write(f"{write_tiny(Path(sys.argv[1]) if sys.argv[1:] else None)}\n")
