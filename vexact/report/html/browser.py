"""Which samples a page carries, and how: as data, which the page shows as text and never as markup."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vexact.report.html.record import RunRecord, SampleFile

BYTES_OF_ALL = 2 << 20  # of text, all runs together
_MOST_FILES, _MOST_SAMPLES = 200, 64
_MOST_CHARACTERS = {"prompt": 4000, "response": 8000, "ground_truth": 1000, "message": 500}
_PLAIN = ("row", "data_source", "status", "finish_reason", "num_tokens", "weights_version")


def sample_pages(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """For every run its name, how many sample files it has, and the content of those that fit in the page."""
    budget = BYTES_OF_ALL // max(1, len(runs))
    return [
        {"run": run.name, "files": len(run.sample_files), "shown": _contents(run.sample_files, budget)} for run in runs
    ]


def _contents(files: Sequence[SampleFile], budget: int) -> list[dict[str, Any]]:
    """First and last, then what lies evenly between, coarse to fine, until the budget is spent."""
    shown: dict[SampleFile, dict[str, Any]] = {}
    for place in _coarse_to_fine(len(files)):
        if len(shown) >= _MOST_FILES or budget <= 0:
            break
        samples, size, more = _samples(files[place].path, budget)
        budget -= size
        if samples:
            shown[files[place]] = {"samples": samples, "more": more}
    return [{"step": file.step, "stem": file.stem, **shown[file]} for file in sorted(shown)]


def _coarse_to_fine(count: int) -> list[int]:
    """All of 0 … count-1, ends first, each further round twice as fine.

    >>> _coarse_to_fine(5)
    [0, 4, 2, 1, 3]
    """
    order: dict[int, None] = {}
    parts = 1
    while len(order) < min(count, _MOST_FILES):
        order |= dict.fromkeys(np.linspace(0, count - 1, min(parts, count - 1) + 1).round().astype(int).tolist())
        parts *= 2
    return list(order)


def _samples(file: Path, budget: int) -> tuple[list[dict[str, Any]], int, bool]:
    """The samples of a file that fit, their size, and whether it has more; a line that is no sample is left out."""
    samples: list[dict[str, Any]] = []
    spent = 0
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                sample = _sample(line)
                if sample is None:
                    continue
                size = len(json.dumps(sample))
                if len(samples) == _MOST_SAMPLES or spent + size > budget:
                    return samples, spent, True
                samples.append(sample)
                spent += size
    except OSError:
        return [], 0, False
    return samples, spent, False


def _sample(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("response"), str):
        return None
    sample: dict[str, Any] = {key: _short(record[key]) for key in _PLAIN if key in record}
    for key, most in _MOST_CHARACTERS.items():
        if record.get(key) is not None:
            text = record[key] if isinstance(record[key], str) else json.dumps(record[key])
            sample[key] = text[:most]
            if len(text) > most:
                sample.setdefault("cut", {})[key] = len(text) - most
    score = record.get("score")
    sample["score"] = score if _is_finite(score) else None
    extra = record.get("extra")
    if isinstance(extra, dict):
        sample["extra"] = {str(key)[:80]: value for key, value in extra.items() if _is_finite(value)}
    different = _places(record.get("different"))
    tokens = _tokens(record, len(sample["response"]), different)
    return sample | ({"tokens": tokens} if tokens else {}) | ({"different": len(different)} if different else {})


def _places(different: Any) -> set[int]:
    """Positions of tokens whose bits differ, shown or not."""
    return {place for place in different if _is_count(place)} if isinstance(different, list) else set()


def _tokens(record: dict[str, Any], shown: int, marked: set[int]) -> list[list[float | None]]:
    """[characters, log-probability] of the tokens of the response's first ``shown`` characters, and a 1 behind where
    the bits differ; [] if they are not there or do not add up to the response."""
    lengths, logprobs = record.get("token_lengths"), record.get("logprobs")
    if not isinstance(lengths, list) or not isinstance(logprobs, list) or len(lengths) != len(logprobs):
        return []
    if not all(map(_is_count, lengths)) or sum(lengths) != len(record["response"]):
        return []
    tokens: list[list[float | None]] = []
    end = 0
    for place, (length, logprob) in enumerate(zip(lengths, logprobs, strict=True)):
        end += length
        if end > shown:
            break
        tokens.append([length, logprob if _is_finite(logprob) else None, *([1] if place in marked else [])])
    return tokens


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**53 if isinstance(value, int) else math.isfinite(value)


def _short(value: Any) -> Any:
    return value if value is None or _is_finite(value) else str(value)[:200]
