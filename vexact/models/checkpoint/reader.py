"""Reading a checkpoint: every tensor has exactly one file, and is read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vexact.models.checkpoint.files import UNFINISHED, checkpoint_directory, listed, mention, require_sound
from vexact.models.checkpoint.index import INDEX, VISIBLE, read_index, single_file

Shape = tuple[int, ...]
_MOST_HEADER = 100_000_000  # bytes; safetensors' own limit

# Beside the weights: what says that they are not the weights of a whole, plain model
_REFUSED_FILES = {
    "adapter_config.json": "a LoRA adapter lies there; merge it into its base model (peft's merge_and_unload), save "
    "that, and remove the adapter's files",
    "hf_quant_config.json": "its weights are quantised; use the bf16 or fp32 original",
    "quantize_config.json": "its weights are quantised; use the bf16 or fp32 original",
    "quant_config.json": "its weights are quantised; use the bf16 or fp32 original",
}


class CheckpointReader:
    """The tensors of a Hugging Face directory by name.

    With an index, the index alone decides which file a tensor comes from; without one there is a single
    ``model.safetensors``. Opening reads the headers only. A context manager: it holds the files open.

    Raises:
        FileNotFoundError, PermissionError: no directory, no weights, or a file that is missing or closed to us.
        ValueError: a damaged file, or an index and files that contradict each other; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.directory = checkpoint_directory(path)
        refuse_other_kinds(self.directory)
        index = read_index(self.directory)
        files = sorted(set(index.values())) if index is not None else [single_file(self.directory)]
        self._handles = {file: _open(file) for file in files}
        held = {file: list(handle.keys()) for file, handle in self._handles.items()}
        self._files = {name: file for file, names in held.items() for name in names} if index is None else index
        if index is not None:
            self._compare(held)
        _mention_unread(self.directory, set(files))

    def _compare(self, held: dict[Path, list[str]]) -> None:
        index = self.directory / INDEX
        for file, names in held.items():
            placed = {name for name, where in self._files.items() if where == file}
            if missing := sorted(placed.difference(names)):
                raise ValueError(
                    f"{index} places {len(missing)} tensors in {file.name} that it does not hold: {listed(missing)}; "
                    "they are of different checkpoints, copy index and files again"
                )
            for name in sorted(set(names) - placed):
                other = self._files.get(name)
                where = "does not name" if other is None else f"places in {other.name}: two files hold it"
                raise ValueError(f"{file} holds {name}, which {INDEX} {where}; copy index and files again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; tensors read before stay valid."""
        self._handles.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file(self, name: str) -> Path:
        """Where a tensor comes from."""
        return self._files[name]

    def shape(self, name: str) -> Shape:
        """From the header; reads no values."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' name of the number format, such as ``BF16``; from the header."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored; its pages are read when its values are used."""
        value: Tensor = self._handles[self._files[name]].get_tensor(name)
        return value

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)


def refuse_other_kinds(directory: Path) -> None:
    """Raises ValueError for a directory whose weights are an adapter or quantised, by the files that say so."""
    for name, why in _REFUSED_FILES.items():
        if (directory / name).exists():
            raise ValueError(f"{directory / name}: {why}")


def _open(file: Path) -> Any:
    require_sound(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        problem = _shortfall(file) or f"is no readable safetensors file ({error})"
        raise ValueError(f"{file} {problem}; download or copy it again") from error


def _shortfall(file: Path) -> str | None:
    """Whether there is less than the file itself promises: eight bytes of length, the header, and where values end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length < size else b""
    if size < 8 or size <= length < _MOST_HEADER:
        return f"has {size} bytes, not even its whole header"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        promised = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return f"has {size} of its {promised} bytes" if size < promised else None


def _mention_unread(directory: Path, read: set[Path]) -> None:
    """Nothing is left out in silence."""
    unread = sorted(path.name for path in directory.glob(VISIBLE) if path not in read)
    if (directory / UNFINISHED).exists():
        unread.append(UNFINISHED)
    if unread:
        mention(f"{directory}: not read, because the checkpoint does not name it: {listed(unread)}")
