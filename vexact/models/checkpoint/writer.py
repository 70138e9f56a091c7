"""Writing a checkpoint over whatever the directory holds, so that what loads is the old one or the new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vexact.models.checkpoint.files import UNFINISHED, sync
from vexact.models.checkpoint.index import INDEX, SHARD, SHARD_PATTERN, SINGLE

CONFIG, GENERATION = "config.json", "generation_config.json"


def write_checkpoint(
    path: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    max_shard_bytes: int,
) -> None:
    """Writes safetensors, an index if there are several files, config.json and generation_config.json.

    No more than one shard is in memory. Everything is written aside first. Then config.json of the old checkpoint goes
    first and that of the new one comes last, so that a directory between the two has none and is refused. Nothing
    of an earlier save stays; files of other names do.

    Args:
        tensors: by Hugging Face name.
        config: of config.json; ``dtype`` becomes that of the tensors.
        generation: of generation_config.json; None for no such file.
        max_shard_bytes: where the next file begins; a larger tensor has a file of its own.
    """
    directory = Path(path)
    aside = directory / UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        dtype = _write_weights(aside, _shards(tensors, max_shard_bytes), alone=not _foreign(directory))
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}  # the older name of dtype
        _write_json(aside / CONFIG, kept | {"dtype": str(dtype).removeprefix("torch.")})
        if generation is not None:
            _write_json(aside / GENERATION, generation)
        for file in (*aside.iterdir(), aside):
            sync(file)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _replace(directory, aside)


def _replace(directory: Path, aside: Path) -> None:
    (directory / CONFIG).unlink(missing_ok=True)
    for file in (directory / INDEX, directory / GENERATION, *_weights(directory)):
        file.unlink(missing_ok=True)
    sync(directory)
    for file in sorted(aside.iterdir(), key=lambda file: file.name == CONFIG):
        if file.name == CONFIG:
            sync(directory)
        file.replace(directory / file.name)
    aside.rmdir()
    sync(directory)


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        assert name not in shard, f"{name} is saved twice"
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def _write_weights(aside: Path, shards: Iterable[dict[str, Tensor]], alone: bool) -> torch.dtype | None:
    """Returns the dtype of the last tensor. ``alone``: no other safetensors file makes an index necessary."""
    inside: list[tuple[str, ...]] = []
    total, dtype = 0, None
    for number, shard in enumerate(shards):
        save_file(shard, aside / f"{number}.part", {"format": "pt"})
        inside.append(tuple(shard))
        for tensor in shard.values():
            total, dtype = total + tensor.nbytes, tensor.dtype
    weight_map: dict[str, str] = {}
    for number, names in enumerate(inside):
        file = SHARD.format(number=number + 1, total=len(inside)) if len(inside) > 1 else SINGLE
        (aside / f"{number}.part").rename(aside / file)
        assert not weight_map.keys() & names, "a tensor is saved twice"
        weight_map |= dict.fromkeys(names, file)
    if len(inside) > 1 or not alone:
        _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return dtype


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights(directory: Path) -> Iterator[Path]:
    """What an earlier save can have left."""
    yield directory / SINGLE
    yield from directory.glob(SHARD_PATTERN)


def _foreign(directory: Path) -> bool:
    return bool(set(directory.glob("*.safetensors")).difference(_weights(directory)))
