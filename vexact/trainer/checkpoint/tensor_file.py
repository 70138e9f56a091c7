"""One safetensors file, written as its tensors come: nothing is held twice, and it is hashed on its way to the disk.

The layout is the one documented for safetensors: the length of a JSON header, the header, the tensors' bytes in order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_PIECE = 1 << 26  # bytes between two looks at whether to go on


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor before its values: what the header says of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensor_file(
    file: Path,
    specs: Sequence[Spec],
    values: Iterable[Sequence[Tensor]],
    metadata: Mapping[str, str],
    go_on: Callable[[], None],
) -> tuple[int, str]:
    """Writes and flushes a new file; returns its bytes and SHA-256.

    Args:
        values: of every spec in order, as consecutive pieces of its bytes: contiguous CPU tensors of any dtype.
        go_on: called between two pieces; what it raises ends the writing.

    Raises:
        OSError: the disk is full or refuses; the file is then cut short.
    """
    digest, size = hashlib.sha256(), 0
    with file.open("xb", buffering=0) as opened, ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        hashing: Future[None] | None = None
        for piece in _pieces(_header(specs, metadata), values):
            go_on()
            before, hashing = hashing, pool.submit(digest.update, piece)  # beside the writing, one piece ahead at most
            _write_all(opened, piece)
            size += len(piece)
            if before is not None:
                before.result()
        if hashing is not None:
            hashing.result()
        go_on()
        os.fsync(opened.fileno())
    return size, digest.hexdigest()


def _header(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        start, end = end, end + torch.Size(spec.shape).numel() * spec.dtype.itemsize
        content[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(header: bytes, values: Iterable[Sequence[Tensor]]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensors in values:
        for tensor in tensors:
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(view), _PIECE):
                yield view[start : start + _PIECE]


def _write_all(opened: FileIO, piece: memoryview) -> None:
    while piece:
        piece = piece[opened.write(piece) :]
