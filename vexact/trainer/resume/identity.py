"""What a run is: settings, data, model, tokenizer and reward, in a form that a checkpoint can hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vexact import __version__
from vexact.config import Config
from vexact.config.fields import flatten
from vexact.data import PromptDataset
from vexact.models import ModelConfig
from vexact.trainer.resume.settings import deciding_settings
from vexact.weights import named_checksums

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
_BOOKKEEPING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that say nothing about what is computed here."""


def run_identity(
    config: Config, device_type: str, total_steps: int, tokenizer: Any, rows: PromptDataset
) -> dict[str, Any]:
    """Plain JSON values: the whole configuration, the part of it that decides the bits, and fingerprints.

    What only the workers know is not in it yet: ``identity["environment"]``, and ``identity["model"]["weights"]``,
    which is ``weights_digest`` of the model as loaded.
    """
    identity = {
        "vexact": __version__,
        "config": config.to_dict(),
        "settings": deciding_settings(config, device_type, total_steps),
        "data": _data(rows, config.data.train_files),
        "model": {"config": _model(config.model.path)},
        "tokenizer": _tokenizer(tokenizer, Path(os.path.expanduser(config.model.tokenizer_path or config.model.path))),
        "reward": _reward(config),
    }
    return dict(json.loads(json.dumps(identity, default=str)))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over name, shape, type and exact checksum of every parameter, whatever files they came from.

    The same on any number of ranks; all that share the parameters call it together.
    """
    digest, checksums = hashlib.sha256(), named_checksums(model)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {checksums[name]}\n".encode())
    return digest.hexdigest()


def _data(rows: PromptDataset, files: Iterable[str]) -> dict[str, Any]:
    """Three digests: of the rows in order, of the rows in any order, and of their token ids."""
    contents, tokens, unordered = hashlib.sha256(), hashlib.sha256(), 0
    for index in range(len(rows)):
        prompt = rows[index]
        fields = [prompt.text, prompt.data_source, prompt.ground_truth, prompt.extra_info]
        row = hashlib.sha256(_text(fields).encode("utf-8", "surrogatepass")).digest()
        contents.update(row)
        unordered = (unordered + int.from_bytes(row, "big")) % (1 << 256)
        tokens.update(hashlib.sha256(np.asarray(prompt.token_ids, dtype=np.int64).tobytes()).digest())
    return {
        "num_rows": len(rows),
        "rows": contents.hexdigest(),
        "rows_in_any_order": f"{unordered:064x}",
        "token_ids": tokens.hexdigest(),
        "files": {name: digest for name in files if (digest := _files_digest(_below(Path(os.path.expanduser(name)))))},
    }


def _text(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
    except (TypeError, ValueError):  # keys of several types
        return repr(value)


def _model(path: str) -> dict[str, Any]:
    config = ModelConfig.from_hf_dir(Path(os.path.expanduser(path)))
    values = {key: value for key, value in flatten(config.raw).items() if key not in _BOOKKEEPING}
    return values | {"eos_token_id": list(config.eos_token_ids)}


def _tokenizer(tokenizer: Any, directory: Path) -> dict[str, Any]:
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return {
        "vocabulary": hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest(),
        "special_tokens": special,
        "chat_template": hashlib.sha256(_text(tokenizer.chat_template).encode("utf-8", "surrogatepass")).hexdigest(),
        "files": _files_digest([directory / name for name in _TOKENIZER_FILES]),
    }


def _reward(config: Config) -> dict[str, Any]:
    custom = config.reward.custom_reward_function
    if custom.path is None:
        return {"function": "built-in graders"}
    return {
        "function": custom.name,
        "file": _files_digest([Path(os.path.expanduser(custom.path))]),
        "kwargs": json.loads(_text(custom.reward_kwargs)),
    }


def _below(path: Path) -> Iterator[Path]:
    """The file itself, or every file of a dataset directory."""
    yield from sorted(path.rglob("*")) if path.is_dir() else [path]


def _files_digest(files: Iterable[Path]) -> str | None:
    """SHA-256 over the names and contents of those that exist; None if none does."""
    digest, seen = hashlib.sha256(), False
    for path in files:
        if path.is_file():
            seen = True
            with path.open("rb") as file:
                digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if seen else None
