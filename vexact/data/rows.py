"""What one dataset row means: verl's columns, or a plain question column and answer column."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vexact.data.ground_truth import GSM8K, own_truth, text_truth
from vexact.data.messages import Message, check_text, plain_messages

EXACT_MATCH = "exact_match"
# Columns by which verl, or transformers' chat templates, put more into a prompt than its text
_BESIDE_TEXT = ("images", "videos", "audios", "tools")
_NOTHING = ("", "[]", "{}", "null", "none", "nan")  # in a column of text
_SINGLE_TURN = "single_turn_agent"
PROCEDURAL = "reasoning_gym/"  # these graders read the task's whole entry, not the ground truth


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
    where: str = field(default="", compare=False)  # file and row number, for messages

    @property
    def text(self) -> str:
        """The prompt as a reader sees it, before any chat template."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message["content"]) for message in self.prompt)


def parse_rows(
    records: Sequence[Mapping[str, Any]], origin: str, columns: ColumnNames, *, custom_reward: bool = False
) -> list[Row]:
    """Turn raw records into rows.

    Args:
        records: one mapping per row, as read from the file.
        origin: the file name, for messages.
        columns: which columns to read.
        custom_reward: the user's own function grades, so ground truths keep their types.

    Raises:
        ValueError: no records; a column is missing; a value has the wrong shape; a ground truth that no answer can
            match. Each names the file, the row and the column.
    """
    if not records:
        raise ValueError(
            f"{origin} holds no rows; give a file with at least one row in data.train_files or data.val_files"
        )
    return [_parse_row(record, f"{origin}, row {n}", columns, custom_reward) for n, record in enumerate(records)]


def _parse_row(record: Mapping[str, Any], where: str, columns: ColumnNames, custom_reward: bool) -> Row:
    if columns.prompt not in record:
        raise _missing(columns.prompt, where, record, "data.prompt_key to the column that holds the prompt or question")
    prompt = _parse_prompt(record[columns.prompt], f"{where}: column {columns.prompt!r}")
    _refuse_more_than_text(record, where, {columns.prompt, columns.answer, columns.data_source})
    extra = record.get("extra_info")
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"{where}: column 'extra_info' must be a mapping, it is {type(extra).__name__} {extra!r:.80}")
    truth = _ground_truth(record, where, columns)
    source = _data_source(record, truth, where, columns)
    column = columns.answer or "reward_model.ground_truth"
    if custom_reward:
        truth = own_truth(truth, f"{where}: column {column!r}")
    elif not source.startswith(PROCEDURAL):
        truth = text_truth(truth, source, f"{where}: column {column!r}")
    elif "entry" not in (extra or {}):
        raise ValueError(
            f"{where}: data_source={source!r} needs extra_info.entry, the whole task entry; make such rows with the "
            "data source 'reasoning_gym:NAME' or with 'vexact prepare reasoning_gym:NAME'"
        )
    return Row(prompt, source, truth, dict(extra or {}), where)


def _parse_prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where} is {'blank' if value else 'an empty string'}; give the prompt, or drop the row")
        if _is_written_chat(value):
            raise ValueError(
                f"{where} is a text that spells a list of messages, {value!r:.80}; store the list itself, not its text"
            )
        return check_text(value, where)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        messages = plain_messages(value, where)
        if not any(message["content"].strip() for message in messages):
            raise ValueError(f"{where}: the content of every message is blank; give the prompt, or drop the row")
        return messages
    raise ValueError(
        f"{where} must be a string or a non-empty list of {{'role', 'content'}} messages, "
        f"it is {type(value).__name__} {value!r:.120}"
    )


def _refuse_more_than_text(record: Mapping[str, Any], where: str, read: set[str | None]) -> None:
    """Raises ValueError for a column, other than those that are ``read``, by which a prompt is not its text alone."""
    for column in (name for name in _BESIDE_TEXT if name not in read):
        held = record.get(column)
        if not isinstance(held, int | float) and not _is_nothing(held):  # a number is a count, or pandas' NaN
            raise ValueError(
                f"{where}: column {column!r} holds {held!r:.60}, which would be left out of the prompt: only text is "
                "supported; drop the column if the text alone is meant"
            )
    agent = record.get("agent_name")
    if isinstance(agent, str) and not _is_nothing(agent) and agent.strip() != _SINGLE_TURN:
        raise ValueError(
            f"{where}: column 'agent_name' asks for {agent!r:.60}, and only {_SINGLE_TURN} is supported: one response "
            "to the prompt; drop the column if that is meant"
        )


def _is_nothing(value: Any) -> bool:
    """Whether a row has no such thing, as files say it: null, a word for it, or a container of nothing else."""
    if isinstance(value, str):
        return "".join(value.split()).lower() in _NOTHING
    if isinstance(value, Mapping):
        return all(map(_is_nothing, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_nothing, value))
    return value is None or (isinstance(value, bytes) and not value)


def _is_written_chat(text: str) -> bool:
    """Whether a list of messages was written into a text column, as JSON or, by a CSV export, as Python."""
    if not text.lstrip().startswith("[{") or "role" not in text or "content" not in text:
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in value)
    return False


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


def _data_source(record: Mapping[str, Any], truth: Any, where: str, columns: ColumnNames) -> str:
    """Rows without the column get a grader by the look of the answer: GSM8K's ``#### 18``, else an exact match."""
    value = record.get(columns.data_source)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN for a missing text
        return GSM8K if isinstance(truth, str) and "####" in truth else EXACT_MATCH
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(
            f"{where}: column {columns.data_source!r} must name the row's grader, it is {type(value).__name__} "
            f"{value!r:.80}; set data.reward_fn_key to the column that does, or leave it null"
        )
    return check_text(str(value), f"{where}: column {columns.data_source!r}")


def _missing(column: str, where: str, record: Mapping[str, Any], fix: str) -> ValueError:
    present = ", ".join(sorted(map(str, record))) or "none"
    return ValueError(f"{where}: no column {column!r}; columns present: {present}. Set {fix}")
