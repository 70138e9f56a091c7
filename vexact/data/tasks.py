"""Procedural tasks in place of a file: ``reasoning_gym:chain_sum?size=2000&seed=1&min_terms=2&max_terms=3``.

``size`` and ``seed`` choose the rows (defaults 500 and 0), ``system_prompt`` names one of the library's system prompts
or is a text of its own; every other key is the task's own difficulty setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl, unquote

from vexact import interrupt
from vexact.data.rows import Row
from vexact.data.task_answers import answer_kind

PREFIX = "reasoning_gym:"
DATA_SOURCE_PREFIX = "reasoning_gym/"
DEFAULT_SIZE, DEFAULT_SEED = 500, 0


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A parsed task specification."""

    name: str
    size: int = DEFAULT_SIZE
    seed: int = DEFAULT_SEED
    system_prompt: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_task(source: str) -> bool:
    """Whether a data source names a procedural task rather than a file."""
    return source.startswith(PREFIX)


def parse_task(source: str) -> TaskSpec:
    """Parse ``reasoning_gym:NAME?key=value&…``; values are read as JSON where they are JSON.

    Raises:
        ValueError: the text is not of that form, or size or seed is not an integer.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    try:
        given = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise ValueError(f"{source!r}: settings must read key=value&key=value after the '?' ({error})") from error
    pairs = {key: _value(text) for key, text in given}
    if len(pairs) < len(given):
        raise ValueError(f"{source!r}: a setting is given twice; keep one of them")
    for key, lowest in (("size", 1), ("seed", 0)):
        if key in pairs and (type(pairs[key]) is not int or not lowest <= pairs[key] < 2**63):
            raise ValueError(f"{source!r}: {key}={pairs[key]!r} must be an integer of at least {lowest} and below 2^63")
    system_prompt = pairs.pop("system_prompt", None)
    size, seed = pairs.pop("size", DEFAULT_SIZE), pairs.pop("seed", DEFAULT_SEED)
    return TaskSpec(unquote(name), size, seed, None if system_prompt is None else str(system_prompt), pairs)


def load_task(source: str) -> list[Row]:
    """All rows of a task. Each row carries its whole entry, so that the task's own scorer can grade the answer.

    Raises:
        ValueError: unknown task (the nearest names are given) or one whose answers cannot be graded safely, unknown or
            refused setting, or reasoning-gym is missing.
    """
    return make_task(parse_task(source))


def make_task(spec: TaskSpec) -> list[Row]:
    """As ``load_task``, from a parsed specification."""
    gym = _reasoning_gym()
    dataset = _create(gym, spec)
    system = (
        None if spec.system_prompt is None else gym.utils.SYSTEM_PROMPTS.get(spec.system_prompt, spec.system_prompt)
    )
    rows = []
    for index in range(len(dataset)):
        interrupt.check()
        entry = dataset[index]
        extra = {"index": index, "task_settings": json.dumps(spec.settings), "entry": encode_entry(entry)}
        rows.append(
            Row(_prompt(entry["question"], system), DATA_SOURCE_PREFIX + spec.name, str(entry["answer"]), extra)
        )
    return rows


def encode_entry(entry: Any) -> str:
    """A task entry as JSON that keeps tuples and non-string keys; the grader decodes it."""
    return json.dumps(_plain(entry))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"__tuple__": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {"__dict__": [[_plain(key), _plain(item)] for key, item in value.items()]}
    return value


def _prompt(question: str, system: str | None) -> str | tuple[dict[str, Any], ...]:
    if system is None:
        return question
    return ({"role": "system", "content": system}, {"role": "user", "content": question})


def _reasoning_gym() -> ModuleType:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError("reasoning-gym tasks need the package reasoning-gym: pip install 'vexact[tasks]'") from error


def _create(gym: ModuleType, spec: TaskSpec) -> Any:
    known = gym.factory.DATASETS
    if spec.name not in known:
        near = difflib.get_close_matches(spec.name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown reasoning-gym task {spec.name!r}; {hint}known tasks: {', '.join(sorted(known))}")
    answer_kind(spec.name)
    allowed = [field.name for field in dataclasses.fields(known[spec.name][1]) if field.name not in ("size", "seed")]
    unknown = sorted(set(spec.settings) - set(allowed))
    if unknown:
        raise ValueError(f"task {spec.name!r} has no setting {', '.join(unknown)}; its settings: {', '.join(allowed)}")
    try:
        return gym.create_dataset(spec.name, size=spec.size, seed=spec.seed, **spec.settings)
    except (AssertionError, TypeError, ValueError) as error:  # the library validates settings with assertions
        raise ValueError(f"task {spec.name!r} refuses the settings {spec.settings}: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
