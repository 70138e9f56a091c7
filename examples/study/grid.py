"""The grid in one YAML: what runs there are, and the overrides that each of them is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

AXES = ("subject", "mode", "correction", "algorithm", "lr", "seed")
LEARNING_RATE, SEED = "actor_rollout_ref.actor.optim.lr", "trainer.seed"
_SECTIONS = {"common", "subjects", "modes", "corrections", "algorithms", "parts", "skip"}


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One run.

    Attributes:
        part: the part of the study that it belongs to.
        subject, mode, correction, algorithm, lr, seed: its place in the grid.
        steps: of training.
        processes: that it starts; more than one go through torchrun.
        prepare: what makes the subject, as ``subject.prepare`` takes it.
        overrides: of its training, without directories.
        exact: overrides that leave nothing but exact sampling, for the score of the trained weights.
    """

    part: str
    subject: str
    mode: str
    correction: str
    algorithm: str
    lr: float
    seed: int
    steps: int
    processes: int
    prepare: Mapping[str, Any]
    overrides: tuple[str, ...]
    exact: tuple[str, ...]

    @property
    def id(self) -> str:
        """Unique in a study, and a file name: the part is no part of it, as parts may share runs."""
        return "-".join(str(getattr(self, axis)) for axis in AXES)


def read_grid(path: str | Path, parts: list[str] | None = None) -> list[RunSpec]:
    """The runs of ``parts`` (all by default) in the order in which they are to run: part by part, seed by seed, so that
    whenever a study ends, its cells have equally many seeds. A run that two parts name is the first's.

    Raises:
        ValueError: the file does not describe a grid; the message names where.
    """
    grid = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(grid, dict) or set(grid) - _SECTIONS or not _SECTIONS - {"skip"} <= set(grid):
        raise ValueError(f"{path} must have the keys {', '.join(sorted(_SECTIONS))} and no other (skip is optional)")
    wanted = list(grid["parts"]) if parts is None else parts
    runs: dict[str, RunSpec] = {}
    for name in wanted:
        if name not in grid["parts"]:
            raise ValueError(f"{path} has no part {name!r}; its parts: {', '.join(grid['parts'])}")
        for spec in _part(path, grid, name):
            runs.setdefault(spec.id, spec)
    return list(runs.values())


def _part(path: str | Path, grid: Mapping[str, Any], name: str) -> list[RunSpec]:
    axes = grid["parts"][name]
    if set(axes) != set(AXES):
        raise ValueError(f"{path}: part {name} must have the keys {', '.join(AXES)}, each with a list")
    skipped = [dict(item) for item in grid.get("skip", [])]
    # the seed moves slowest
    points = [
        dict(zip(("seed", *AXES[:-1]), values, strict=True))
        for values in itertools.product(*(axes[axis] for axis in ("seed", *AXES[:-1])))
    ]
    return [
        _spec(path, grid, name, point) for point in points if not any(item.items() <= point.items() for item in skipped)
    ]


def _spec(path: str | Path, grid: Mapping[str, Any], part: str, point: Mapping[str, Any]) -> RunSpec:
    subject = _named(path, grid, "subjects", point["subject"])
    mode = _named(path, grid, "modes", point["mode"])
    correction = _named(path, grid, "corrections", point["correction"])
    algorithm = _named(path, grid, "algorithms", point["algorithm"])
    instead = correction.get("instead", {}).get(point["mode"], correction["overrides"])
    lr, seed = float(point["lr"]), int(point["seed"])
    exact = (*grid["common"], *subject["overrides"], f"{SEED}={seed}")
    return RunSpec(
        **{axis: str(point[axis]) for axis in AXES[:4]},
        part=part,
        lr=lr,
        seed=seed,
        steps=int(subject["steps"]),
        processes=int(mode.get("processes", 1)),
        prepare=subject["prepare"],
        overrides=(
            *exact,
            *algorithm["overrides"],
            *mode["overrides"],
            *instead,
            f"{LEARNING_RATE}={lr:g}",
            f"trainer.total_training_steps={subject['steps']}",
        ),
        exact=exact,
    )


def _named(path: str | Path, grid: Mapping[str, Any], section: str, name: Any) -> Mapping[str, Any]:
    if name not in grid[section]:
        raise ValueError(f"{path}: {section} has no {name!r}; it has {', '.join(map(str, grid[section]))}")
    entry: Mapping[str, Any] = grid[section][name]
    return entry
