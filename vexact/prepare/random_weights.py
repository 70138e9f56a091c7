"""A checkpoint of a public model's shape with seeded random weights, written one shard at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vexact import interrupt
from vexact.prepare.directory import require_disk
from vexact.prepare.files import write_generation_config
from vexact.prepare.shapes import SHAPES
from vexact.prepare.tokenizers import byte_tokenizer

SHARD_BYTES = 1 << 30
DTYPES = ("bfloat16", "float16", "float32")

Shape = tuple[int, ...]


def write_random_model(directory: Path, arch: str, seed: int = 0, dtype: str = "bfloat16") -> None:
    """Write config, weights N(0, 0.02) (norms one, biases zero) and a byte-level tokenizer of the whole vocabulary.

    A tensor depends on the seed and its own name only, so that memory holds one shard at a time.

    Raises:
        ValueError: unknown ``arch`` or ``dtype``, or too little disk.
    """
    if arch not in SHAPES:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    tokenizer = byte_tokenizer(SHAPES[arch]["vocab_size"])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    raw = SHAPES[arch] | {"eos_token_id": eos, "pad_token_id": pad, "dtype": dtype}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    write_generation_config(directory, eos, pad)
    tokenizer.save_pretrained(directory)
    _write_weights(directory, raw, seed)


def _write_weights(directory: Path, raw: dict[str, Any], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, raw["dtype"])
    shards = _shards(_tensor_shapes(raw), dtype.itemsize)
    total = sum(_num_bytes(shape, dtype.itemsize) for shard in shards for shape in shard.values())
    require_disk(directory, total)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {
            name: _tensor(name, shape, seed, raw["initializer_range"]).to(dtype) for name, shape in shard.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensor_shapes(raw: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Hugging Face names and shapes, from a model without storage."""
    import torch

    from vexact.models import CausalLM, ModelConfig
    from vexact.models.hf_names import to_hf

    config = ModelConfig.from_hf_dict(raw)
    with torch.device("meta"):
        model = CausalLM(config)
    for name, tensor in to_hf(config, model.named_parameters()):
        yield name, tuple(tensor.shape)


def _shards(shapes: Iterator[tuple[str, Shape]], itemsize: int) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes:
        num_bytes = _num_bytes(shape, itemsize)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def _num_bytes(shape: Shape, itemsize: int) -> int:
    count = itemsize
    for extent in shape:
        count *= extent
    return count


def _tensor(name: str, shape: Shape, seed: int, std: float) -> Any:
    import torch

    interrupt.check()
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
