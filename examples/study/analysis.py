"""From the results of a study to its cells: bands over seeds, differences at equal seeds, and what is seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bands import Band, band
from outcomes import MISMATCHES, OUTCOMES, outcomes

LEVEL, STRICT_LEVEL = 0.95, 0.99
LEAST_SEEDS = 4  # of a verdict
LEAST_EFFECT, SMALL_EFFECT = 0.02, 0.05  # of the exact score
EXACT, UNCORRECTED = "none", "uncorrected"

Cell = tuple[str, str, float, str, str]
"""(subject, algorithm, learning rate, mode, correction)"""


@dataclass(frozen=True, slots=True)
class Effect:
    """A difference at equal seeds: its 95 % and 99 % bands, and the verdict on it."""

    wide: Band
    strict: Band

    @property
    def verdict(self) -> str:
        """``seen``, ``small`` or ``open``, as registered; ``few`` where there are too few seeds to say."""
        if self.wide.seeds < LEAST_SEEDS:
            return "few"
        if self.strict.excludes(0.0) and abs(self.wide.mean) >= LEAST_EFFECT:
            return "seen"
        return "small" if self.wide.low >= -SMALL_EFFECT and self.wide.high <= SMALL_EFFECT else "open"


class Study:
    """The runs of some parts, as outcomes by cell and seed.

    Args:
        rows: of ``results.read_results``.
        thresholds: of the reward, by subject.
        cells: those that are asked for. Only seeds that every one of them has count, so that all have equally many; a
            cell without any run is left out and named in ``missing``.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], thresholds: Mapping[str, float], cells: Sequence[Cell]
    ) -> None:
        found: dict[Cell, dict[int, Mapping[str, Any]]] = defaultdict(dict)
        for row in rows:
            cell = (row["subject"], row["algorithm"], row["lr"], row["mode"], row["correction"])
            found[cell][row["seed"]] = row
        wanted = list(dict.fromkeys(cells))
        self.missing = [cell for cell in wanted if cell not in found]
        self.cells = [cell for cell in wanted if cell in found]
        seeds = [set(found[cell]) for cell in self.cells]
        self.seeds = sorted(set.intersection(*seeds)) if seeds else []
        self.rows = {cell: {seed: found[cell][seed] for seed in self.seeds} for cell in self.cells}
        self._outcomes = {
            cell: {seed: outcomes(row, thresholds[cell[0]]) for seed, row in runs.items()}
            for cell, runs in self.rows.items()
        }

    def values(self, cell: Cell, outcome: str) -> dict[int, float]:
        """By seed."""
        assert outcome in (*OUTCOMES, *MISMATCHES), outcome
        return {seed: values[outcome] for seed, values in self._outcomes[cell].items()}

    def band(self, cell: Cell, outcome: str) -> Band:
        """The mean over seeds, at 95 %."""
        return band(list(self.values(cell, outcome).values()), LEVEL, _name(cell, outcome))

    def differences(self, cell: Cell, reference: Cell, outcome: str) -> list[float]:
        """Of being ``cell`` and not ``reference``, seed by seed; none where one of them has no runs."""
        if cell not in self.rows or reference not in self.rows:
            return []
        first, second = self.values(cell, outcome), self.values(reference, outcome)
        return [first[seed] - second[seed] for seed in self.seeds]

    def effect(self, cell: Cell, reference: Cell, outcome: str) -> Effect | None:
        """The mean of ``differences``; None where there are none."""
        found = self.differences(cell, reference, outcome)
        if not found:
            return None
        name = f"{_name(cell, outcome)} - {_name(reference, outcome)}"
        wide, strict = (band(found, level, name) for level in (LEVEL, STRICT_LEVEL))
        return Effect(wide, strict)

    def comparisons(self) -> list[tuple[Cell, Cell]]:
        """Every cell with what it is compared with: exact runs, and, where it is corrected, uncorrected ones."""
        pairs = [(cell, other(cell)) for cell in self.cells for other in (exact_cell, uncorrected_cell)]
        return [(cell, other) for cell, other in dict.fromkeys(pairs) if other != cell and other in self.rows]


def exact_cell(cell: Cell) -> Cell:
    """The exact runs that the cell is compared with."""
    return (*cell[:3], EXACT, UNCORRECTED)


def uncorrected_cell(cell: Cell) -> Cell:
    """The same without correction."""
    return (*cell[:4], UNCORRECTED)


def _name(cell: Cell, outcome: str) -> str:
    return " ".join(map(str, (*cell, outcome)))
