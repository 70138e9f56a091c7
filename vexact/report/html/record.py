"""What a run directory holds, read as far as it can be: of a run that is done, was killed, or goes on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from vexact.report.sinks.jsonl import FILE_NAME as METRICS_FILE
from vexact.report.starts import FILE_NAME as STARTS_FILE
from vexact.report.starts import changed_settings, history, read_starts

CONFIG_FILE, CERTIFICATE_FILE, ENVIRONMENT_FILE = "config.yaml", "certificate.json", "environment.json"
DIVERGENCE_FILE = "divergence.txt"
_SCORE = "critic/score/mean"  # of every step that trained
_MOST_CHARACTERS = 20_000  # of it
_SAMPLE_FILE = re.compile(r"(step|val)_(\d{1,15})\.jsonl")
_LARGEST_STEP = 2**53  # a page's numbers are doubles


class NoRunError(ValueError):
    """A path that is no run directory."""


class Series(NamedTuple):
    """One metric of one run."""

    steps: np.ndarray  # (S,) int64, ascending
    values: np.ndarray  # (S,) float64; NaN where the step wrote null


class SampleFile(NamedTuple):
    """``samples/step_7.jsonl`` or ``samples/val_7.jsonl``."""

    step: int
    stem: str
    path: Path


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it. Nested files are flat: ``{"trainer.seed": 42}``."""

    path: Path
    name: str
    series: Mapping[str, Series]
    last_step: int | None
    last_time: float | None  # seconds since 1970
    config: Mapping[str, Any]  # of the last start
    certificate: Mapping[str, Any]
    environment: Mapping[str, Any]
    sample_files: tuple[SampleFile, ...]
    problems: tuple[str, ...] = field(default=())
    divergence: str = ""  # where rollout and trainer part, of a run that this stopped
    changed: Mapping[str, str] = field(default_factory=dict)  # settings that not all steps were made under: which when

    @property
    def total_steps(self) -> int | None:
        """As far as the configuration says."""
        total = self.config.get("trainer.total_training_steps")
        return total if isinstance(total, int) else None

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The configuration of all steps; a setting that changed is a text that says which value held when."""
        return {**self.config, **self.changed}

    @cached_property
    def seed(self) -> str:
        """Everything that only makes the run another draw of the same configuration, as it is in force."""
        general, *others = (self.settings.get(key) for key in SEED_KEYS)
        return json.dumps([general, *(general if seed is None else seed for seed in others)], default=str)

    @cached_property
    def trained_steps(self) -> frozenset[int]:
        """Steps that trained, as far as they were reported; one that an error stopped is none of them."""
        scores = self.series.get(_SCORE)
        return frozenset(() if scores is None else scores.steps.tolist())


SEED_KEYS = ("trainer.seed", "data.seed", "actor_rollout_ref.rollout.seed")
"""The first stands in for others that are null."""

_TRAINER_ONLY_WRITES = (
    "project_name experiment_name default_local_dir logger report samples_per_step save_freq keep_last best_metric "
    "best_metric_mode resume_mode resume_from_path resume_changed"
)
ONLY_WRITES = frozenset(f"trainer.{name}" for name in _TRAINER_ONLY_WRITES.split())
"""Keys that say what is written where."""


def read_run(path: str | Path) -> RunRecord:
    """The run in a directory, or that of a ``metrics.jsonl``.

    What is missing or broken is left out and named in ``problems``.

    Raises:
        NoRunError: there is no such directory, or no run has written to it.
    """
    given = Path(path)
    place = given.parent if given.name == METRICS_FILE and given.is_file() else given
    if not place.is_dir():
        reason = "is a file" if place.exists() else "does not exist"
        raise NoRunError(f"{given} {reason}; give the directory of a run, such as runs/vexact/tiny_arithmetic")
    if not any((place / name).is_file() for name in (METRICS_FILE, CONFIG_FILE)):
        below = sorted(file.parent for file in place.glob(f"*/{METRICS_FILE}"))
        hint = f"; did you mean {' '.join(map(str, below[:5]))}?" if below else ""
        raise NoRunError(f"{given} is not a run directory: it has neither {METRICS_FILE} nor {CONFIG_FILE}{hint}")
    problems: list[str] = []
    rows = _rows(place / METRICS_FILE, problems)
    series = _series(rows)
    for name, (_, values) in series.items():
        if count := int(np.isnan(values).sum()):
            problems.append(f"{name} is not finite in {count} of {len(values)} steps")
    if missing := _missing(series):
        problems.append(f"{METRICS_FILE} lacks {missing} of the steps that were trained")
    config = _flat(_loaded(place / CONFIG_FILE, problems))
    changed = _changed(place, config, problems)
    times = [time for row in rows.values() if (time := row.get("time")) is not None]
    return RunRecord(
        path=place,
        name=place.resolve().name,
        series=series,
        last_step=max(rows, default=None),
        last_time=max(times, default=None),
        config=config,
        certificate=_flat(_loaded(place / CERTIFICATE_FILE, problems)),
        environment=_flat(_loaded(place / ENVIRONMENT_FILE, problems)),
        sample_files=_sample_files(place / "samples"),
        problems=tuple(problems),
        divergence=_text(place / DIVERGENCE_FILE),
        changed=changed,
    )


def told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs, with names that are not the same: as much of the path as that takes."""
    names = [run.name for run in runs]
    for length in range(2, 1 + max((len(run.path.resolve().parts) for run in runs), default=0)):
        if len(set(names)) == len(names):
            break
        names = [
            name if names.count(name) == 1 else "/".join(run.path.resolve().parts[-length:])
            for name, run in zip(names, runs, strict=True)
        ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _rows(file: Path, problems: list[str]) -> dict[int, dict[str, float | None]]:
    """Step -> its metrics. A step that was written twice, by a run that was killed in between, has its later values."""
    rows: dict[int, dict[str, float | None]] = {}
    broken = []
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                step, row = _row(line)
                if step is not None:
                    rows.setdefault(step, {}).update(row)
                elif line.strip():
                    broken.append(number)
    except OSError as error:
        problems.append(f"{METRICS_FILE} cannot be read: {error.strerror}")
    if broken:
        where = f"line {broken[0]}" if len(broken) == 1 else f"{len(broken)} lines, the first of them {broken[0]},"
        problems.append(f"{METRICS_FILE}: {where} left out: no JSON object with a step (cut off, or not ours)")
    if not rows:
        problems.append(f"{METRICS_FILE} has no steps yet (trainer.logger must name jsonl)")
    return dict(sorted(rows.items()))


def _row(line: str) -> tuple[int | None, dict[str, float | None]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, {}
    step = record.get("step") if isinstance(record, dict) else None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _LARGEST_STEP:
        return None, {}
    return step, {name: _finite(value) for name, value in record.items() if name != "step" and _is_number(value)}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: float | None) -> float | None:
    try:
        number = math.nan if value is None else float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _series(rows: Mapping[int, Mapping[str, float | None]]) -> dict[str, Series]:
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for step, row in rows.items():
        for name, value in row.items():
            if name != "time":
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(math.nan if value is None else value)
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}


def _missing(series: Mapping[str, Series]) -> int:
    """How many steps between the first and the last that trained are not there: a full disk lost them, for instance."""
    if _SCORE not in series:
        return 0
    steps = series[_SCORE].steps
    return int(steps[-1] - steps[0]) + 1 - len(steps)


def _loaded(file: Path, problems: list[str]) -> Any:
    """The file's content; {} with a problem noted where it is absent or broken."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
        json.dumps(tree, default=str)  # YAML has more than can be shown
        if isinstance(tree, dict):
            return tree
        problems.append(f"{file.name} cannot be read: it holds no keys")
    except FileNotFoundError:
        problems.append(f"there is no {file.name}")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{file.name} cannot be read: {' '.join(str(error).split())[:200]}")
    return {}


def _changed(place: Path, config: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """Settings that earlier starts had otherwise, but for those of what is written where; told as a problem, too."""
    try:
        starts = read_starts(place)
    except OSError as error:
        problems.append(f"{STARTS_FILE} cannot be read: {error.strerror}")
        return {}
    found = changed_settings([(start.first_step, _flat(start.config)) for start in starts])
    changed = {key: history(values) for key, values in found.items() if key not in ONLY_WRITES}
    if not _ends_matter(config):
        changed.pop("trainer.total_training_steps", None)
    problems += [f"not the same in all steps: {key} was {text}" for key, text in changed.items()]
    return changed


def _ends_matter(config: Mapping[str, Any]) -> bool:
    """Whether the number of steps shapes the learning rate."""
    optim = "actor_rollout_ref.actor.optim"
    return config.get(f"{optim}.lr_scheduler_type") != "constant" or bool(config.get(f"{optim}.lr_warmup_steps_ratio"))


def _text(file: Path) -> str:
    """The beginning of a file that few runs have."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            return lines.read(_MOST_CHARACTERS).strip()
    except OSError:
        return ""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of a tree's leaves; an empty branch is a leaf."""
    return dict(_leaves(tree, prefix)) if isinstance(tree, dict) else {}


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _sample_files(folder: Path) -> tuple[SampleFile, ...]:
    files = list(folder.iterdir()) if folder.is_dir() else []
    found = ((file, _SAMPLE_FILE.fullmatch(file.name)) for file in files)
    return tuple(sorted(SampleFile(int(name[2]), name[1], file) for file, name in found if name is not None))
