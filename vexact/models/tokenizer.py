"""A checkpoint's tokenizer: from local files, without running code of the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vexact.models.checkpoint.files import checkpoint_directory, is_there, read_json, require_sound

_WHOLE = ("tokenizer.json", "tokenizer_config.json")  # one of them is enough to try
_SMALL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_OTHERS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")


def has_tokenizer(path: str | Path) -> bool:
    """Whether the directory has tokenizer files."""
    return any(is_there(checkpoint_directory(path) / name) for name in _WHOLE)


def read_tokenizer(path: str | Path) -> Any:
    """The ``transformers`` tokenizer in a directory.

    Raises:
        ValueError, FileNotFoundError, PermissionError: none there, or one that cannot be read; the file is named.
    """
    directory = checkpoint_directory(path)
    if not has_tokenizer(directory):
        raise ValueError(f"no tokenizer in {directory}; put tokenizer.json and tokenizer_config.json there")
    for name in (*_SMALL_JSON, *_OTHERS):
        if is_there(directory / name):
            require_sound(directory / name)
    for name in _SMALL_JSON:
        if is_there(directory / name):
            read_json(directory / name)
    from transformers import AutoTokenizer  # a second of import time that a ready model does not need

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer.encode("")  # some settings are not looked at before there is text
        return tokenizer
    except Exception as error:  # of any class: tokenizers raises bare Exceptions, and files lead transformers anywhere
        for name in ("tokenizer.json", "vocab.json"):
            if is_there(directory / name):
                read_json(directory / name)
        _refuse_config(directory)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer in {directory} cannot be loaded ({first}); copy its files again") from error


def _refuse_config(directory: Path) -> None:
    """
    Raises:
        ValueError: transformers, which looks for the tokenizer's class there, does not take config.json.
    """
    from transformers import AutoConfig

    file = directory / "config.json"
    try:
        if is_there(file):
            AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError):  # of an architecture that it does not know: it goes on without the file
        return
    except Exception as error:  # of any class, as above
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file}: transformers, which reads the tokenizer beside it, does not take this file ({why}); correct that "
            "value, or copy config.json of the original checkpoint"
        ) from error
