"""Metrics of a step and of a validation, under verl's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from vexact.types import Sample, SampleGroup, Score, TrainSequence


def summary(prefix: str, values: Iterable[float] | np.ndarray) -> dict[str, float]:
    """``<prefix>/{mean,max,min}``; nothing for no values.

    >>> summary("critic/rewards", [0.0, 1.0])
    {'critic/rewards/mean': 0.5, 'critic/rewards/max': 1.0, 'critic/rewards/min': 0.0}
    """
    array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    if array.size == 0:
        return {}
    return {
        f"{prefix}/mean": float(array.mean()),
        f"{prefix}/max": float(array.max()),
        f"{prefix}/min": float(array.min()),
    }


def score_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """``critic/score/*``, ``reward/<key>/mean`` of the grader's further keys, ``reward/frac_zero_std_groups``."""
    scores = [score for group in groups for score in group.scores]
    if not scores:
        return {}
    metrics = summary("critic/score", [score.value for score in scores])
    metrics |= {f"reward/{_named(key, 'time_s')}/mean": value for key, value in _extra_means(scores).items()}
    flat = [len({score.value for score in group.scores}) == 1 for group in groups if group.scores]
    metrics["reward/frac_zero_std_groups"] = sum(flat) / len(flat)
    return metrics


def advantage_metrics(sequences: Sequence[TrainSequence]) -> dict[str, float]:
    """``critic/advantages/*`` over response tokens."""
    if not sequences:
        return {}
    return summary("critic/advantages", np.concatenate([sequence.advantages for sequence in sequences]))


def length_metrics(samples: Sequence[Sample], max_prompt_length: int, max_response_length: int) -> dict[str, float]:
    """``response_length/*`` and ``prompt_length/*``; ``clip_ratio`` is the share that reached the limit."""
    metrics: dict[str, float] = {}
    lengths = {
        "response_length": ([len(sample.token_ids) for sample in samples], max_response_length),
        "prompt_length": ([len(sample.prompt_token_ids) for sample in samples], max_prompt_length),
    }
    for prefix, (values, limit) in lengths.items():
        if values:
            metrics |= summary(prefix, values)
            metrics[f"{prefix}/clip_ratio"] = sum(value >= limit for value in values) / len(values)
    return metrics


def perf_metrics(num_tokens: int, step_s: float, num_gpus: int = 1) -> dict[str, float]:
    """``perf/{total_num_tokens,time_per_step,throughput}``; throughput is tokens per second and GPU."""
    return {
        "perf/total_num_tokens": float(num_tokens),
        "perf/time_per_step": step_s,
        "perf/throughput": num_tokens / (step_s * num_gpus) if step_s > 0 else 0.0,
    }


def validation_metrics(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """``val-core/<data source>/<acc or reward>/mean@k`` and the grader's further keys as ``val-aux/…``.

    k is the number of samples per prompt. The core value is ``acc`` where the grader returns it. Every prompt weighs
    the same.
    """
    sources: dict[str, list[SampleGroup]] = defaultdict(list)
    for group in filter(lambda group: group.scores, groups):
        sources[group.prompt.data_source].append(group)
    metrics: dict[str, float] = {}
    for source, members in sources.items():
        k = max(len(group.scores) for group in members)
        means = _mean_over_prompts(members)
        core = "acc" if "acc" in means else "reward"
        for key, value in means.items():
            section = "val-core" if key == core else "val-aux"
            metrics[f"{section}/{source}/{key}/mean@{k}"] = value
    return metrics


def _named(key: str, ours: str) -> str:
    """A key that a grader returned, such that it does not take the place of the metric that we call so."""
    return f"extra_{key}" if key == ours else key


def _mean_over_prompts(groups: Sequence[SampleGroup]) -> dict[str, float]:
    """Mean of the score ("reward") and of each further key, first within a prompt, then over prompts."""
    means = {"reward": float(np.mean([np.mean([score.value for score in group.scores]) for group in groups]))}
    for key in sorted({key for group in groups for score in group.scores for key in score.extra}):
        per_prompt = [_values(group.scores, key) for group in groups]
        means[_named(key, "reward")] = float(np.mean([np.mean(values) for values in per_prompt if values]))
    return means


def _values(scores: Sequence[Score], key: str) -> list[float]:
    """A failed grader counts as 0; a grader that chose not to return the key is not counted."""
    return [score.extra.get(key, 0.0) for score in scores if key in score.extra or score.status != "ok"]


def _extra_means(scores: Sequence[Score]) -> dict[str, float]:
    """Mean over the scores that have the key: a failed grader returned none of them."""
    values: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        for key, value in score.extra.items():
            values[key].append(value)
    return {key: float(np.mean(items)) for key, items in values.items()}
