"""The results of a study in one parquet: a row per run, its curves as lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from one_run import CURVES

_TEXT = ("id", "part", "subject", "mode", "correction", "algorithm", "status", "environment")
_SCHEMA = pyarrow.schema(
    [
        *((name, pyarrow.string()) for name in _TEXT),
        ("lr", pyarrow.float64()),
        ("seed", pyarrow.int64()),
        ("steps", pyarrow.int64()),
        ("exact_score", pyarrow.float64()),
        ("wall_s", pyarrow.float64()),
        ("cpu_s", pyarrow.float64()),
        *((name, pyarrow.list_(pyarrow.float32())) for name in CURVES),
    ]
)


def write_results(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes one row per run, in the order of their ids; of a run that is there twice, the last.

    Of the environment, versions, device and commit are kept.
    """
    by_id = {row["id"]: {**row, "environment": _short(row["environment"])} for row in rows}
    table = pyarrow.Table.from_pylist([by_id[id] for id in sorted(by_id)], schema=_SCHEMA)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows that ``write_results`` wrote."""
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, schema=_SCHEMA).to_pylist()
    return rows


def _short(environment: str) -> str:
    values = json.loads(environment)
    return json.dumps({key: values.get(key) for key in ("versions", "device", "commit")})
