"""``samples/step_N.jsonl``: what the model wrote and what it got for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vexact.report.samples.token_text import TokenText
from vexact.types import Sample, SampleGroup, Score


def write_samples(
    run_dir: str | Path,
    step: int,
    groups: Sequence[SampleGroup],
    decode: Callable[[Sequence[int]], str] | None = None,
    limit: int = -1,
    stem: str = "step",
    different: Mapping[str, Sequence[int]] | None = None,
) -> Path | None:
    """Write one JSON object per sample; the file appears only once it is complete.

    Args:
        groups: scored groups.
        decode: token ids to text. With it, samples that carry no text get one, and all get the log-probabilities of
            their tokens and how many characters of the response each token wrote.
        limit: at most so many samples; -1 writes all, 0 writes no file.
        stem: "step", or "val" for a validation.
        different: positions in the response, by request, whose bits differ between rollout and training.

    Returns:
        The file, or None for ``limit=0``.
    """
    if limit == 0:
        return None
    path = Path(run_dir) / "samples" / f"{stem}_{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        # A lone surrogate, which UTF-8 has no bytes for, becomes \udc80, which JSON reads as the same character.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            records = _records(groups, TokenText(decode) if decode else None, different or {})
            for record in islice(records, None if limit < 0 else limit):
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _records(
    groups: Sequence[SampleGroup], tokens: TokenText | None, different: Mapping[str, Sequence[int]]
) -> Iterable[dict[str, Any]]:
    for group in groups:
        for index, sample in enumerate(group.samples):
            score = group.scores[index] if group.scores else None
            text = sample.text if sample.text is not None or tokens is None else tokens.decode(sample.token_ids)
            yield {
                "row": group.prompt.row,
                "data_source": group.prompt.data_source,
                "prompt": group.prompt.text,
                "response": text,
                "ground_truth": group.prompt.ground_truth,
                **_score_fields(score),
                "finish_reason": sample.finish_reason,
                "num_prompt_tokens": len(sample.prompt_token_ids),
                "num_tokens": len(sample.token_ids),
                "weights_version": sample.weights_version,
                "request_id": sample.request_id,
                **_token_fields(sample, text, tokens),
                **({"different": list(wrong)} if (wrong := different.get(sample.request_id)) else {}),
            }


def _token_fields(sample: Sample, text: str | None, tokens: TokenText | None) -> dict[str, Any]:
    """``token_lengths`` in characters, and ``logprobs`` to three digits; null is one that is not finite."""
    if text is None or tokens is None:
        return {}
    logprobs = [round(value, 3) if math.isfinite(value) else None for value in sample.logprobs.tolist()]
    return {"token_lengths": tokens.lengths(sample.token_ids, text), "logprobs": logprobs}


def _score_fields(score: Score | None) -> dict[str, Any]:
    if score is None:
        return {"score": None}
    fields: dict[str, Any] = {"score": score.value, "extra": score.extra, "status": score.status}
    return fields | ({"message": score.message} if score.message else {})
