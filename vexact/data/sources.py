"""Reading rows: parquet, JSONL, JSON, a saved Hugging Face dataset directory, or a procedural task by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vexact.data import tasks
from vexact.data.rows import ColumnNames, Row, parse_rows

Record = dict[str, Any]


def load_rows(
    files: str | Path | Sequence[str | Path], columns: ColumnNames | None = None, max_samples: int = -1
) -> list[Row]:
    """Rows of one or several sources, in order.

    Args:
        files: paths, or ``reasoning_gym:NAME?size=…&seed=…`` specifications.
        columns: column names; verl's by default.
        max_samples: keep only the first so many rows (-1: all).

    Raises:
        ValueError: a source is missing, unreadable, of an unknown kind, empty, or has wrong columns.
    """
    paths = [files] if isinstance(files, (str, Path)) else list(files)
    if not paths:
        raise ValueError("no data files given; set data.train_files (and data.val_files) to a file or a list of files")
    rows: list[Row] = []
    for path in paths:
        rows.extend(_load_one(path, columns or ColumnNames()))
    return rows if max_samples < 0 else rows[:max_samples]


def _load_one(source: str | Path, columns: ColumnNames) -> list[Row]:
    if isinstance(source, str) and tasks.is_task(source):
        return tasks.load_task(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(
            f"data file {str(path)!r} does not exist (looked in {Path.cwd()}); "
            "set data.train_files / data.val_files to an existing file, "
            f"or to a task such as '{tasks.PREFIX}chain_sum?size=2000&seed=1'"
        )
    return parse_rows(_reader(path)(path), str(path), columns)


def _reader(path: Path) -> Callable[[Path], list[Record]]:
    if path.is_dir():
        return _read_dataset_dir
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: unknown data file type {path.suffix!r}; known: {', '.join(READERS)}, or a dataset directory"
        )
    return reader


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                records.append(_json_object(line, f"{path}, line {number}"))
    return records


def _read_json(path: Path) -> list[Record]:
    """One JSON array of objects; a file of one object per line is read as JSONL."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {number}: expected a JSON object, got {record!r:.80}")
    return records


def _json_object(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {record!r:.80}")
    return record


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
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a directory written by datasets.save_to_disk: {error}") from error
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
