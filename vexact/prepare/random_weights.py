"""A checkpoint of a public model's shape with seeded random weights, written one shard at a time."""

from __future__ import annotations

import hashlib
import math
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
    _write_weights(directory, raw, seed)
    write_generation_config(directory, eos, pad)
    tokenizer.save_pretrained(directory)


def _write_weights(directory: Path, raw: dict[str, Any], seed: int) -> None:
    import torch

    from vexact.models.checkpoint import write_checkpoint

    dtype, shapes = getattr(torch, raw["dtype"]), dict(_tensor_shapes(raw))
    require_disk(directory, sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize)
    std = raw["initializer_range"]
    tensors = ((name, _tensor(name, shape, seed, std).to(dtype)) for name, shape in shapes.items())
    write_checkpoint(directory, tensors, raw, None, SHARD_BYTES)


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
