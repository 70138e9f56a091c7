"""What an offline W&B run has written: records in LevelDB's log format behind a header of 7 bytes."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7


def records(file: Path) -> Iterator[Record]:
    data, at, parts = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block is too short for a header
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(file: Path) -> list[dict]:
    """Rows as they were logged."""
    rows = (record.history.item for record in records(file) if record.HasField("history"))
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def definitions(file: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Metric -> its step metric and what the summary keeps, in the order of the definitions."""
    found = {}
    for record in records(file):
        if record.HasField("metric"):
            metric = record.metric
            kept = [field.name for field, value in metric.summary.ListFields() if value is True]
            found[metric.name] = metric.step_metric, tuple(sorted(kept))
    return found
