"""Reading rows: parquet, JSONL, JSON, a saved Hugging Face dataset directory, or a procedural task by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vexact.data import tasks
from vexact.data.rows import ColumnNames, Row, parse_rows

Record = dict[str, Any]
_LFS_POINTER = b"version https://git-lfs."


def load_rows(
    files: str | Path | Sequence[str | Path],
    columns: ColumnNames | None = None,
    max_samples: int = -1,
    *,
    custom_reward: bool = False,
) -> list[Row]:
    """Rows of one or several sources, in order.

    Args:
        files: paths, or ``reasoning_gym:NAME?size=…&seed=…`` specifications.
        columns: column names; verl's by default.
        max_samples: keep only the first so many rows (-1: all).
        custom_reward: the user's own function grades, so ground truths keep their types.

    Raises:
        ValueError: a source is missing, unreadable, of an unknown kind, empty, or has wrong columns or values.
    """
    paths = [files] if isinstance(files, (str, Path)) else list(files)
    if not paths:
        raise ValueError("no data files given; set data.train_files (and data.val_files) to a file or a list of files")
    rows: list[Row] = []
    for path in paths:
        rows.extend(_load_one(path, columns or ColumnNames(), custom_reward))
    return rows if max_samples < 0 else rows[:max_samples]


def _load_one(source: str | Path, columns: ColumnNames, custom_reward: bool) -> list[Row]:
    if isinstance(source, str) and tasks.is_task(source):
        return tasks.load_task(source)
    path = Path(os.path.expanduser(source))
    if not path.exists():
        raise ValueError(
            f"data file {str(path)!r} does not exist (looked in {Path.cwd()}); "
            "set data.train_files / data.val_files to an existing file, "
            f"or to a task such as '{tasks.PREFIX}chain_sum?size=2000&seed=1'"
        )
    return parse_rows(_reader(path)(path), str(path), columns, custom_reward=custom_reward)


def _reader(path: Path) -> Callable[[Path], list[Record]]:
    if path.is_dir():
        return _read_dataset_dir
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: unknown data file type {path.suffix!r}; known: {', '.join(READERS)}, or a dataset directory"
        )
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the data; fetch the file with git lfs pull")
    return reader


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:  # this file alone: read_table would add columns for folders named key=value
            table = file.read()
        names = table.column_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{path} has several columns named {twice[0]!r}; keep one")
        return table.to_pylist()
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _read_jsonl(path: Path) -> list[Record]:
    lines = _text(path).split("\n")
    return [
        _object(_json(line, f"{path}, line {number}"), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _read_json(path: Path) -> list[Record]:
    """One JSON array of objects; a file of one object per line is read as JSONL."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    return [_object(record, f"{path}, row {number}") for number, record in enumerate(_json(text, str(path)))]


def _text(path: Path) -> str:
    """The file's text, without the byte-order mark that some editors write."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}; save it as UTF-8"
        ) from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return record


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {value!r:.80}")
    return value


def _read_dataset_dir(path: Path) -> list[Record]:
    """A directory written by ``datasets.Dataset.save_to_disk``."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path} is a directory: reading a saved Hugging Face dataset needs the package 'datasets' "
            "(pip install datasets); or give a .parquet or .jsonl file"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a directory written by datasets.save_to_disk: {error}; or name the files in it"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise ValueError(
            f"{path} holds several splits ({', '.join(loaded)}); give one of them, such as {path}/{next(iter(loaded))}"
        )
    return loaded.to_list()


READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
