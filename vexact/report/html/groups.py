"""Runs of one configuration, and the mean of a metric over their seeds with its confidence band."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vexact.report.html.record import ONLY_WRITES, SEED_KEYS, RunRecord, Series

SAME_TRAINING = {*SEED_KEYS, *ONLY_WRITES}
"""Keys that runs of one group may differ in."""

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond them the normal distribution's is close enough
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
_T_NORMAL = 1.960
_LABEL_KEYS = 3  # in a group's name; the table of differences has them all


class Band(NamedTuple):
    """Mean over seeds, and a 95 % confidence interval of it where there are two or more seeds; else NaN."""

    steps: np.ndarray  # (S,) int64
    mean: np.ndarray  # (S,) float64
    low: np.ndarray  # (S,)
    high: np.ndarray  # (S,)

    @property
    def has_interval(self) -> bool:
        return bool(np.isfinite(self.low).any())


@dataclass(frozen=True)
class Group:
    """Runs whose configurations differ in nothing but seeds and names."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def num_seeds(self) -> int:
        return len({run.seed for run in self.runs})

    def metric_names(self) -> set[str]:
        return {name for run in self.runs for name in run.series}

    def series(self, name: str) -> list[Series]:
        """Of every run that has the metric."""
        return [run.series[name] for run in self.runs if name in run.series]

    def band(self, name: str) -> Band | None:
        """Runs that repeat a seed count as one; at each step, the seeds that have it count."""
        by_seed: dict[str, list[Series]] = defaultdict(list)
        for run in self.runs:
            if name in run.series:
                by_seed[run.seed].append(run.series[name])
        if not by_seed:
            return None
        return _interval([_mean(members) for members in by_seed.values()])


def grouped(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs, named by what sets them apart."""
    by_training: dict[str, list[RunRecord]] = defaultdict(list)
    for run in runs:
        by_training[_training(run)].append(run)
    if len(by_training) == 1:
        return [Group(_names(runs), tuple(runs))]
    members = list(by_training.values())
    keys = [key for key in differing([group[0].settings for group in members]) if key not in SAME_TRAINING]
    labels = [_label(group, keys) for group in members]
    return [
        Group(label if labels.count(label) == 1 else f"{label} [{_names(group)}]", tuple(group))
        for label, group in zip(labels, members, strict=True)
    ]


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all tables, in the order of their appearance."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({_text(table, key) for table in tables}) > 1]


def _text(table: Mapping[str, Any], key: str) -> str:
    return json.dumps(table[key], default=str, sort_keys=True) if key in table else ""


def _training(run: RunRecord) -> str:
    """What two runs of one group have in common; a run without a configuration is alone."""
    if not run.settings:
        return str(run.path)
    settings = {key: value for key, value in run.settings.items() if key not in SAME_TRAINING}
    return json.dumps(settings, default=str, sort_keys=True)


def _names(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(run.name for run in runs))
    return ", ".join(names[:_LABEL_KEYS]) + (f" and {len(names) - _LABEL_KEYS} more" if len(names) > 3 else "")


def _label(group: Sequence[RunRecord], keys: Sequence[str]) -> str:
    config = group[0].settings
    if not config or not keys:
        return _names(group)
    short = [f"{key.rpartition('.')[2]}={config.get(key, 'absent')}" for key in keys[:_LABEL_KEYS]]
    return ", ".join(short) + (", …" if len(keys) > _LABEL_KEYS else "")


def _aligned(members: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (S,) of any member, and values (M, S), NaN where a member lacks the step."""
    steps = np.unique(np.concatenate([series.steps for series in members]))
    values = np.full((len(members), len(steps)), np.nan)
    for row, series in zip(values, members, strict=True):
        row[np.searchsorted(steps, series.steps)] = series.values
    return steps, values


def _mean(members: Sequence[Series]) -> Series:
    if len(members) == 1:
        return members[0]
    steps, values = _aligned(members)
    return Series(steps, _over(values, np.nanmean))


def _over(values: np.ndarray, function: Any) -> np.ndarray:
    """``function`` over the rows, NaN for a column of NaN only."""
    result = np.full(values.shape[1], np.nan)
    filled = np.isfinite(values).any(axis=0)
    result[filled] = function(values[:, filled], axis=0)
    return result


def _interval(seeds: Sequence[Series]) -> Band:
    """mean ± t · s / √n, of n seeds with standard deviation s."""
    steps, values = _aligned(seeds)
    count = np.isfinite(values).sum(axis=0)
    mean = _over(values, np.nanmean)
    quantile = np.array([np.nan, np.nan, *_T, _T_NORMAL])[np.minimum(count, len(_T) + 2)]
    half = np.full(len(steps), np.nan)
    several = count > 1
    half[several] = np.nanstd(values[:, several], axis=0, ddof=1) / np.sqrt(count[several])
    half *= quantile
    return Band(steps, mean, mean - half, mean + half)


def metric_names(groups: Iterable[Group]) -> set[str]:
    return {name for group in groups for name in group.metric_names()}
