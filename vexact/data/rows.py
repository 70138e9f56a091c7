"""What one dataset row means: verl's columns, or a plain question column and answer column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EXACT_MATCH = "exact_match"
GSM8K = "openai/gsm8k"

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Which columns hold what. ``answer`` wins over ``reward_model.ground_truth`` when it is set."""

    prompt: str = "prompt"  # data.prompt_key
    answer: str | None = None  # data.answer_key
    data_source: str = "data_source"  # data.reward_fn_key


@dataclass(frozen=True, slots=True)
class Row:
    """One row before tokenisation. ``messages`` is a chat; ``prompt`` is set instead for a plain string."""

    prompt: str | tuple[Message, ...]
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as a reader sees it, before any chat template."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message["content"]) for message in self.prompt)


def parse_rows(records: Sequence[Mapping[str, Any]], origin: str, columns: ColumnNames) -> list[Row]:
    """Turn raw records into rows.

    Args:
        records: one mapping per row, as read from the file.
        origin: the file name, for messages.
        columns: which columns to read.

    Raises:
        ValueError: no records; a column is missing; a value has the wrong shape. Each names the file and the row.
    """
    if not records:
        raise ValueError(
            f"{origin} holds no rows; give a file with at least one row in data.train_files or data.val_files"
        )
    return [_parse_row(record, number, origin, columns) for number, record in enumerate(records)]


def _parse_row(record: Mapping[str, Any], number: int, origin: str, columns: ColumnNames) -> Row:
    where = f"{origin}, row {number}"
    if columns.prompt not in record:
        raise _missing(columns.prompt, where, record, "data.prompt_key to the column that holds the prompt or question")
    prompt = _parse_prompt(record[columns.prompt], where, columns.prompt)
    truth = _ground_truth(record, where, columns)
    extra = record.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"{where}: column 'extra_info' must be a mapping, it is {type(extra).__name__} {extra!r:.80}")
    return Row(prompt, _data_source(record, truth, columns), truth, dict(extra or {}))


def _parse_prompt(value: Any, where: str, column: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: column {column!r} is an empty string")
        return value
    if isinstance(value, Sequence) and value and all(_is_message(item) for item in value):
        return tuple(dict(item) for item in value)
    raise ValueError(
        f"{where}: column {column!r} must be a string or a non-empty list of {{'role', 'content'}} messages, "
        f"it is {type(value).__name__} {value!r:.120}"
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and {"role", "content"} <= set(item)


def _ground_truth(record: Mapping[str, Any], where: str, columns: ColumnNames) -> Any:
    if columns.answer is not None:
        if columns.answer not in record:
            raise _missing(columns.answer, where, record, "data.answer_key to the column that holds the answer")
        return record[columns.answer]
    if "reward_model" not in record:
        raise _missing("reward_model", where, record, "data.answer_key to the column that holds the answer")
    model = record["reward_model"]
    if not isinstance(model, Mapping) or "ground_truth" not in model:
        raise ValueError(
            f"{where}: column 'reward_model' must be a mapping with the key 'ground_truth', it is {model!r:.120}; "
            "set data.answer_key if the answer has a column of its own"
        )
    return model["ground_truth"]


def _data_source(record: Mapping[str, Any], truth: Any, columns: ColumnNames) -> str:
    """Rows without the column get a grader by the look of the answer: GSM8K's ``#### 18``, else an exact match."""
    value = record.get(columns.data_source)
    if value is not None:
        return str(value)
    return GSM8K if isinstance(truth, str) and "####" in truth else EXACT_MATCH


def _missing(column: str, where: str, record: Mapping[str, Any], fix: str) -> ValueError:
    present = ", ".join(sorted(map(str, record))) or "none"
    return ValueError(f"{where}: no column {column!r}; columns present: {present}. Set {fix}")
