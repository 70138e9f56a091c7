"""``trainer_state/``: one safetensors file per rank for each of weights and moments; its name and what its header says.

The directory is laid out as torch.distributed.checkpoint's HuggingFaceStorageWriter does it, so its reader reads it.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.progress import is_count

FOLDER = "trainer_state"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
_NAME = re.compile(rf"({'|'.join(KINDS)})-([0-9]{{5,}})-of-([0-9]{{5,}})\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's key for where in the whole tensor a shard begins
_OURS = "vexact"


@dataclass(frozen=True, slots=True)
class Header:
    """What every file says of the state it is a part of."""

    step: int
    num_updates: int
    num_steps: dict[str, int]  # of AdamW, by parameter; empty before the first step
    shapes: dict[str, list[int]]  # of the whole tensors of this kind, by parameter


@dataclass(frozen=True, slots=True)
class Written:
    """A file that one rank wrote and flushed."""

    name: str  # relative to the checkpoint directory
    rank: int
    host: str
    bytes: int
    sha256: str


def file_name(kind: str, rank: int, world_size: int) -> str:
    """Ranks count from 1 in names.

    >>> file_name("weight", 0, 4)
    'weight-00001-of-00004.safetensors'
    """
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def parse_name(name: str) -> tuple[str, int, int] | None:
    """(kind, rank, world size); None for the name of something else."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1], int(match[2]) - 1, int(match[3]))


def metadata(header: Header, first_rows: dict[str, int], num_dims: dict[str, int]) -> dict[str, str]:
    """For the header of a file.

    Args:
        first_rows: where this rank's rows begin in the whole tensor, by key. num_dims: of each tensor.
    """
    offsets = {key: {"saved_offsets": [row, *[0] * (num_dims[key] - 1)]} for key, row in first_rows.items()}
    return {"format": "pt", _OFFSETS: json.dumps(offsets), _OURS: json.dumps(asdict(header))}


def read_header(file: Path) -> tuple[Header, dict[str, tuple[int, int]]]:
    """What a file says, and by parameter the range of rows it holds. Reads no values.

    Raises:
        CheckpointError: it is no such file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata() or {}
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
        content, offsets = json.loads(said[_OURS]), json.loads(said[_OFFSETS])
        header = Header(**content)
        _require(header)
        rows = {}
        for key, shape in shapes.items():
            name = key.partition(".")[2]
            first, *others = offsets[key]["saved_offsets"]
            whole = header.shapes[name]
            if not is_count(first) or any(others) or shape[1:] != whole[1:] or first + shape[0] > whole[0]:
                raise ValueError(f"{key} of shape {shape} at row {first!r} is no part of a tensor of shape {whole}")
            rows[name] = (first, first + shape[0])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{file} is no shard of a trainer state: {what[:200]}") from error
    return header, rows


def _require(header: Header) -> None:
    numbers: Any = header.num_steps
    whole: Any = header.shapes
    if not is_count(header.step) or not is_count(header.num_updates):
        raise ValueError(f"step {header.step!r} and num_updates {header.num_updates!r} are no counts")
    if not isinstance(numbers, dict) or not all(map(is_count, numbers.values())):
        raise ValueError(f"num_steps {numbers!r:.80} are no counts by name")
    if not isinstance(whole, dict) or not all(
        isinstance(s, list) and s and all(map(is_count, s)) for s in whole.values()
    ):
        raise ValueError(f"shapes {whole!r:.80} are no shapes by name")
