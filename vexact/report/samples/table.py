"""A few samples as rows of a table, for dashboards; the files in ``samples/`` have all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vexact.types import Sample, SampleGroup

COLUMNS = ("prompt", "response", "score", "ground truth", "tokens", "mean log-probability", "tokens that differ")
_MOST_PROMPTS, _MOST_CHARACTERS = 24, 2000
Row = tuple[str, str, float | None, str, int, float | None, str]


def sample_rows(
    groups: Sequence[SampleGroup],
    decode: Callable[[Sequence[int]], str],
    different: Mapping[str, Sequence[int]] | None = None,
) -> list[Row]:
    """Of up to 24 prompts the best and the worst sample, one where all score the same; rows have ``COLUMNS``.

    Prompts with tokens that differ come first, the others lie evenly over the groups, so that validations show the same
    prompts each time.

    Args:
        groups: scored groups.
        decode: token ids to text.
        different: of the requests that were compared, positions in the response whose bits differ between rollout and
            training; None where nothing was compared.
    """
    compared = different or {}
    marked = {name for name, positions in compared.items() if positions}
    wrong = [group for group in groups if any(sample.request_id in marked for sample in group.samples)]
    right = [group for group in groups if group not in wrong] if wrong else list(groups)
    left = max(0, _MOST_PROMPTS - len(wrong))
    places = np.linspace(0, len(right) - 1, min(left, len(right))).round().astype(int).tolist() if right else []
    chosen = [*wrong[:_MOST_PROMPTS], *(right[place] for place in places)]
    return [_row(group, index, decode, compared) for group in chosen for index in _shown(group, marked)]


def _shown(group: SampleGroup, marked: set[str]) -> list[int]:
    """Those with tokens that differ, the best and the worst."""
    indices = [i for i, sample in enumerate(group.samples) if sample.request_id in marked][:4]
    if group.scores:
        values = [score.value for score in group.scores]
        best, worst = max(range(len(values)), key=values.__getitem__), min(range(len(values)), key=values.__getitem__)
        indices += [best, worst] if values[best] != values[worst] else [best]
    elif group.samples:
        indices.append(0)
    return list(dict.fromkeys(indices))


def _row(
    group: SampleGroup,
    index: int,
    decode: Callable[[Sequence[int]], str],
    different: Mapping[str, Sequence[int]],
) -> Row:
    sample = group.samples[index]
    response = sample.text if sample.text is not None else decode(sample.token_ids)
    mean = float(sample.logprobs.mean()) if len(sample.logprobs) else None
    return (
        _cut(group.prompt.text),
        _cut(response),
        group.scores[index].value if group.scores else None,
        _cut(_text(group.prompt.ground_truth)),
        len(sample.token_ids),
        mean if mean is not None and np.isfinite(mean) else None,
        _positions(sample, different.get(sample.request_id)),
    )


def _positions(sample: Sample, different: Sequence[int] | None) -> str:
    """``2 of 24: 5, 9``"""
    if different is None:
        return "not compared"
    text = f"{len(different)} of {len(sample.token_ids)}"
    if not different:
        return text
    return f"{text}: {', '.join(map(str, different[:20]))}{', …' if len(different) > 20 else ''}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    """Of a lone surrogate, which UTF-8 has no bytes for, its code."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} … ({len(text)} characters)"
