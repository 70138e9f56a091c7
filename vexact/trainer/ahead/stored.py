"""The next step's samples and scores as a checkpoint holds them: numbers as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vexact.data import PromptDataset
from vexact.trainer.checkpoint import CheckpointError
from vexact.trainer.checkpoint.manifest import read_manifest
from vexact.trainer.step.collect import Collected
from vexact.types import Sample, SampleGroup, Score

FOLDER = "next_step"  # beside the model's own safetensors
TEXT, NUMBERS = f"{FOLDER}/samples.json", f"{FOLDER}/numbers.safetensors"
_ARRAYS = ("token_ids", "logprobs", "min_logits")
_ROUTES = "route_digests"  # of a model with experts
_FIELDS = ("request_id", "temperature", "finish_reason", "weights_version", "stop_reason", "text")


def write_collected(directory: Path, step: int, collected: Collected) -> None:
    """Writes what ``step`` will train on. Raises OSError."""
    sampled = [(group, sample) for group in collected.sampled for sample in group.samples]
    samples = [sample for _, sample in sampled]
    numbers = {
        "token_ids": _packed([sample.token_ids for sample in samples], np.int32),
        "logprobs": _packed([sample.logprobs for sample in samples], np.float32),
        "min_logits": _packed([sample.min_logits for sample in samples], np.float32),
        "lengths": np.array([len(sample.token_ids) for sample in samples], np.int64),
        "prompt_token_ids": _packed([group.prompt.token_ids for group in collected.sampled], np.int32),
        "prompt_lengths": np.array([len(group.prompt.token_ids) for group in collected.sampled], np.int64),
    }
    digests = [sample.route_digests for sample in samples if sample.route_digests is not None]
    if digests and len(digests) == len(samples):
        numbers[_ROUTES] = _packed(digests, np.int64)
    position = {id(group): index for index, group in enumerate(collected.sampled)}
    content = {
        "step": step,
        "cursor": collected.cursor,
        "metrics": collected.metrics,
        "trained": [position[id(group)] for group in collected.groups],
        "groups": [
            {
                "row": group.prompt.row,
                "samples": [{name: getattr(sample, name) for name in _FIELDS} for sample in group.samples],
                "scores": [asdict(score) for score in group.scores],
            }
            for group in collected.sampled
        ],
    }
    (directory / FOLDER).mkdir()
    (directory / NUMBERS).write_bytes(save(numbers))
    (directory / TEXT).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_collected(path: Path, step: int, rows: PromptDataset) -> Collected | None:
    """What ``step`` is to train on, from a checkpoint that has been verified; None when it holds no such samples.

    Raises:
        CheckpointError: the files hold something else, or samples of other prompts than ``rows``.
    """
    manifest = read_manifest(path)
    if manifest is None or TEXT not in manifest["files"]:
        return None
    try:
        content = json.loads((path / TEXT).read_bytes())
        if content["step"] != step:
            raise ValueError(f"it is of step {content['step']!r}, expected step {step}")
        sampled = list(_groups(content["groups"], load((path / NUMBERS).read_bytes()), rows))
        return Collected([sampled[i] for i in content["trained"]], sampled, content["cursor"], content["metrics"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path / TEXT} holds no samples to go on with: {what[:200]}") from error


def _groups(groups: list[dict[str, Any]], numbers: dict[str, np.ndarray], rows: PromptDataset) -> Iterator[SampleGroup]:
    edges = numbers["lengths"].cumsum()[:-1]
    names = [*_ARRAYS, *(name for name in (_ROUTES,) if name in numbers)]
    parts = zip(*(np.split(numbers[name], edges) for name in names), strict=True)
    listed = sum(len(group["samples"]) for group in groups)
    if listed != len(numbers["lengths"]):
        raise ValueError(f"{listed} samples are listed, and {len(numbers['lengths'])} are in {NUMBERS}")
    prompts = np.split(numbers["prompt_token_ids"], numbers["prompt_lengths"].cumsum()[:-1])
    for group, token_ids in zip(groups, prompts, strict=True):
        prompt = rows[group["row"]]
        if tuple(prompt.token_ids) != tuple(token_ids.tolist()):
            raise ValueError(f"row {prompt.row} of data.train_files is another prompt now")
        samples = tuple(_sample(fields, prompt.token_ids, *next(parts)) for fields in group["samples"])
        yield SampleGroup(prompt, samples, tuple(Score(**score) for score in group["scores"]))


def _sample(
    fields: dict[str, Any],
    prompt: tuple[int, ...],
    token_ids: np.ndarray,
    logprobs: np.ndarray,
    min_logits: np.ndarray,
    route_digests: np.ndarray | None = None,
) -> Sample:
    return Sample(
        prompt_token_ids=prompt,
        token_ids=tuple(token_ids.tolist()),
        logprobs=logprobs.copy(),
        min_logits=min_logits.copy(),
        route_digests=None if route_digests is None else route_digests.copy(),
        **{name: fields[name] for name in _FIELDS},
    )


def _packed(parts: Sequence[Any], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype) for part in parts])
