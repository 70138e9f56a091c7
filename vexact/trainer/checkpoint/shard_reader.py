"""Reading ``trainer_state/`` on any number of ranks: whichever rows are asked for, from whichever files hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vexact.models.checkpoint.files import listed
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.shard_files import KINDS, Header, file_name, parse_name, read_header, row_range
from vexact.training import ActorState
from vexact.training.parallel.ranks import local

_MOST_OPEN = 128  # files at a time, whatever the number of ranks that wrote them


class ShardedState:
    """A stored state. Opening reads the headers only, and finds out whether the files make up a whole.

    Raises:
        CheckpointError: a file is missing, damaged or of another state; the message names it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = _complete(directory)
        headers = {file: read_header(file) for file in files}
        first = headers[files[0]][0]
        self.step, self.num_updates = first.step, first.num_updates
        for file, (header, _) in headers.items():
            _require_alike(files[0], first, file, header)
        self.num_steps = first.num_steps
        self.tensors: dict[str, StoredRows] = {}  # by key, as Actor.sharded_state names them
        for kind in dict.fromkeys(map(_kind, files)):
            of_kind = {file: each for file, each in headers.items() if _kind(file) == kind}
            for name, shape in next(iter(of_kind.values()))[0].shapes.items():
                pieces = [(*rows[name], file) for file, (_, rows) in of_kind.items() if name in rows]
                self.tensors[f"{kind}.{name}"] = StoredRows(self, f"{kind}.{name}", tuple(shape), sorted(pieces))
        self.open = lru_cache(maxsize=_MOST_OPEN)(_open)

    @property
    def has_moments(self) -> bool:
        """Whether there is more than weights."""
        return bool(self.num_steps) or any(not key.startswith("weight.") for key in self.tensors)

    def read_into(self, blank: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reads what ``blank`` holds of each tensor; returns the state, with an empty tensor for one it has not.

        Raises:
            ValueError: a tensor has another shape or dtype.
        """
        state = {"num_updates": torch.tensor(self.num_updates)}
        state |= {f"num_steps.{name}": torch.tensor(count) for name, count in self.num_steps.items()}
        for key, stored in self.tensors.items():
            state[key] = blank.get(key, torch.empty(0))
            if key in blank:
                stored.copy_to(blank[key])
        return state

    def whole(self) -> ActorState:
        """Every tensor on the host."""
        parameters: dict[str, Any] = defaultdict(dict)
        for key, stored in self.tensors.items():
            kind, _, name = key.partition(".")
            parameters[name][kind] = stored.rows(0, stored.shape[0])
        for name, count in self.num_steps.items():
            parameters[name]["num_steps"] = float(count)
        return ActorState(num_updates=self.num_updates, parameters=dict(parameters))


class StoredRows:
    """One tensor in the files of one or several ranks."""

    def __init__(
        self, state: ShardedState, key: str, shape: tuple[int, ...], pieces: list[tuple[int, int, Path]]
    ) -> None:
        self.shape, self._state, self._key, self._pieces = shape, state, key, pieces
        end = 0
        for start, stop, file in pieces:
            if start != end:
                what = "twice" if start < end else "in no file"
                raise CheckpointError(f"{file}: rows {min(start, end)} to {max(start, end)} of {key} are {what}")
            end = stop
        if end != shape[0]:
            raise CheckpointError(f"{state.directory}: rows {end} to {shape[0]} of {key} are in no file")

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, on the CPU; what lies in one file shares the mapped file's memory."""
        found = [
            self._state.open(file).get_slice(self._key)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in self._pieces
            if max(start, first) < min(stop, last)
        ]
        if not found:
            _, _, file = self._pieces[0]
            return self._state.open(file).get_slice(self._key)[0:0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def copy_to(self, tensor: Tensor) -> None:
        """Fills the rows of ``tensor``, whole or sharded, that lie on this rank."""
        what = self._key.replace(".", " of ", 1)
        if self.shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"the checkpoint is of another model: {what} has shape {self.shape}, the model has {shape}"
            )
        rows = self.rows(*row_range(tensor))
        if rows.dtype != tensor.dtype:
            raise ValueError(f"{what} is {rows.dtype}, the model has {tensor.dtype}; it would be rounded in silence")
        local(tensor).copy_(rows)


def _complete(directory: Path) -> list[Path]:
    """All files of a state, weights first."""
    found = {path.name: parsed for path in sorted(directory.iterdir()) if (parsed := parse_name(path.name)) is not None}
    if not found:
        raise CheckpointError(f"{directory} holds no shard of a trainer state")
    sizes = {world_size for _, _, world_size in found.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            f"{directory} holds shards of {listed(sorted(map(str, sizes)))} ranks; only one can be meant"
        )
    kinds = [kind for kind in KINDS if kind == "weight" or any(kind == each for each, _, _ in found.values())]
    wanted = (file_name(kind, rank, *sizes) for kind in kinds for rank in range(*sizes))
    if missing := next((name for name in wanted if name not in found), None):
        raise CheckpointError(f"{directory / missing} is missing")
    return sorted((directory / name for name in found), key=lambda file: (KINDS.index(_kind(file)), file.name))


def _require_alike(first: Path, saved: Header, file: Path, header: Header) -> None:
    same = (saved.step, saved.num_updates, saved.num_steps) == (header.step, header.num_updates, header.num_steps)
    if not same or saved.shapes != header.shapes:
        raise CheckpointError(f"{file} is of another state than {first.name}: step {header.step}, not {saved.step}")


def _kind(file: Path) -> str:
    parsed = parse_name(file.name)
    assert parsed is not None
    return parsed[0]


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")
