"""The results of a study in one parquet: a row per run, its curves as lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    """Writes one row per run, in the order of their ids; of a run that is there twice, the first.

    Of the environment, versions, device and commit are kept.

    Raises:
        ValueError: a run is there twice with different results.
    """
    short = [{**row, "environment": _short(row["environment"])} for row in rows]
    by_id: dict[str, dict[str, Any]] = {}
    for row in pyarrow.Table.from_pylist(short, schema=_SCHEMA).to_pylist():
        if not _same(row, by_id.setdefault(row["id"], row)):
            raise ValueError(
                f"the run {row['id']} is there twice with different results (on {_device(by_id[row['id']])} and on "
                f"{_device(row)}): leave one of the two out, or give its subject another name in one of the files"
            )
    table = pyarrow.Table.from_pylist([by_id[id] for id in sorted(by_id)], schema=_SCHEMA)
    pyarrow.parquet.write_table(table, path, compression="zstd")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows that ``write_results`` wrote."""
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, schema=_SCHEMA).to_pylist()
    return rows


def _same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether status, score and all curves are equal, NaN being equal to NaN."""
    curves = (np.array_equal(row[name], other[name], equal_nan=True) for name in CURVES)
    scores = np.array_equal(row["exact_score"], other["exact_score"], equal_nan=True)
    return row["status"] == other["status"] and scores and all(curves)


def _device(row: Mapping[str, Any]) -> str:
    environment = json.loads(row["environment"])
    return f"{environment['device']}, torch {(environment['versions'] or {}).get('torch')}"


def _short(environment: str) -> str:
    values = json.loads(environment)
    return json.dumps({key: values.get(key) for key in ("versions", "device", "commit")})
