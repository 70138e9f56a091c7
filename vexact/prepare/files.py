"""Files that several preparations write: parquet rows in verl's format, and the small JSON files beside weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vexact.data.rows import Row


def write_parquet(rows: Sequence[Row], path: Path, split: str) -> None:
    """Rows in verl's columns; a string prompt becomes one user message."""
    import pyarrow
    import pyarrow.parquet

    records = [_record(row, number, split) for number, row in enumerate(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def write_generation_config(directory: Path, eos_token_id: int, pad_token_id: int) -> None:
    """Where ``transformers`` and the engine look for the stop token."""
    values = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _record(row: Row, number: int, split: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    return {
        "data_source": row.data_source,
        "prompt": messages,
        "ability": row.data_source.partition("/")[2] or row.data_source,
        "reward_model": {"style": "rule", "ground_truth": row.ground_truth},
        "extra_info": {**row.extra_info, "index": number, "split": split},
    }
