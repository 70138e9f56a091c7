"""Reading ``trainer_state/`` on any number of ranks: whichever rows are asked for, from whichever files hold them."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vexact.models.checkpoint.files import listed
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.shard_files import KINDS, Header, file_name, parse_name, read_header
from vexact.training import ActorState

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
        parameters: dict[str, dict[str, StoredRows | float]] = defaultdict(dict)
        for kind in dict.fromkeys(map(_kind, files)):
            of_kind = {file: each for file, each in headers.items() if _kind(file) == kind}
            shapes = next(iter(of_kind.values()))[0].shapes
            for name, shape in shapes.items():
                pieces = [(*rows[name], file) for file, (_, rows) in of_kind.items() if name in rows]
                parameters[name][kind] = StoredRows(self, f"{kind}/{name}", tuple(shape), sorted(pieces))
        for name, count in first.num_steps.items():
            parameters[name]["num_steps"] = count
        self.parameters = dict(parameters)
        self.open = lru_cache(maxsize=_MOST_OPEN)(_open)

    def whole(self) -> ActorState:
        """Every tensor on the host."""
        parameters: Any = {
            name: {
                key: part.rows(0, part.shape[0]) if isinstance(part, StoredRows) else part
                for key, part in parts.items()
            }
            for name, parts in self.parameters.items()
        }
        return ActorState(num_updates=self.num_updates, parameters=parameters)


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
