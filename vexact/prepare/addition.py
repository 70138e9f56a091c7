"""The arithmetic task of the tiny model: small sums, and the answers its warm-up sees."""

from __future__ import annotations

import random

from vexact.data.rows import Row

DATA_SOURCE = "vexact/addition"
LARGEST = 19  # summands are 0..LARGEST: 400 different prompts
NUM_TEST = 40

SHARE_RIGHT = 0.28  # of the doubtful answers; the others are off by 1 to 3
COPIES = 8  # how many doubtful answers each prompt gets

Pair = tuple[str, str]


def addition_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """All sums, shuffled: (training rows, test rows); no test row is a training row."""
    sums = [(left, right) for left in range(LARGEST + 1) for right in range(LARGEST + 1)]
    random.Random(seed).shuffle(sums)
    rows = [Row(f"{left}+{right}=", DATA_SOURCE, str(left + right)) for left, right in sums]
    return rows[NUM_TEST:], rows[:NUM_TEST]


def right_answers(rows: list[Row]) -> list[Pair]:
    """(prompt, right answer) of every row."""
    return [(row.text, row.ground_truth) for row in rows]


def doubtful_answers(rows: list[Row], seed: int) -> list[Pair]:
    """(prompt, answer) with every prompt ``COPIES`` times and about ``SHARE_RIGHT`` of the answers right."""
    rng = random.Random(seed)
    return [(row.text, _doubtful(int(row.ground_truth), rng)) for _ in range(COPIES) for row in rows]


def _doubtful(right: int, rng: random.Random) -> str:
    if rng.random() < SHARE_RIGHT:
        return str(right)
    return str(max(0, right + rng.choice((-3, -2, -1, 1, 2, 3))))
