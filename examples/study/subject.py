"""The study's subject: a tiny model that has learned to write partial sums, and to doubt them.

A prompt is a row of digits, ``5+9+3+8=``; its answer the sums modulo 10 after every digit, ``5475``. A response is
right when all of it is, so one wrong token anywhere costs the reward, as in a chain of reasoning. As with ``vexact
prepare tiny``, a supervised warm-up teaches the answers, and a second, short one doubts: what it sees goes astray with
some probability at every digit (and goes on from the wrong sum). What is left for reinforcement learning is to find
out which tokens pay.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from vexact.data.rows import Row
from vexact.prepare import prepare
from vexact.prepare.directory import build_directory
from vexact.prepare.files import write_parquet
from vexact.prepare.tiny_shapes import tiny_config, tiny_moe_config
from vexact.prepare.tokenizers import character_tokenizer
from vexact.prepare.warm_up import new_model, save_model, teach

DATA_SOURCE = "vexact/partial_sums"  # graded as an exact match
NUM_TEST = 128
RIGHT_LR, DOUBTFUL_LR = 3e-3, 5e-4
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
EXPERTS = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
BALANCE_LOSS = 0.05


def prepare_subject(directory: Path, name: str = "partial_sums", **options: Any) -> Path:
    """Makes the subject below ``directory`` once, and returns it.

    Args:
        name: ``partial_sums``, or what ``vexact prepare`` knows.
        options: of that.

    Raises:
        ValueError: unknown name or options, or the directory holds something else.
    """
    if name != "partial_sums":
        return prepare(name, directory, **options)
    return build_directory(name, directory, write_partial_sums, options)


def write_partial_sums(
    directory: Path,
    experts: bool = False,
    terms: int = 8,
    doubt: float = 0.2,
    right_steps: int = 800,
    doubtful_steps: int = 60,
    prompts: int = 1536,
    seed: int = 0,
) -> None:
    """Writes ``model/``, ``train.parquet`` and ``test.parquet``.

    Args:
        experts: a mixture, two of eight experts a token in every layer.
        terms: digits of a prompt, and of its answer.
        doubt: probability that a digit of a doubtful answer is another one.
        right_steps, doubtful_steps: optimizer steps of the two warm-ups.
        prompts: to train with; few of them are learned by heart, and held-out ones are then answered worse.
        seed: of weights, rows and doubts.
    """
    import torch

    torch.set_num_threads(1)  # sums split over threads would round differently from machine to machine
    rows = partial_sum_rows(prompts + NUM_TEST, terms, seed)
    train, test = rows[NUM_TEST:], rows[:NUM_TEST]
    write_parquet(train, directory / "train.parquet", "train")
    write_parquet(test, directory / "test.parquet", "test")
    tokenizer = character_tokenizer()
    raw = tiny_moe_config(tokenizer) | EXPERTS if experts else tiny_config(tokenizer) | SHAPE
    model = new_model(raw, seed)
    draw = random.Random(seed)
    right = [(row.text, row.ground_truth) for row in train]
    doubtful = [(row.text, doubtful_answer(row.text, doubt, draw)) for _ in range(4) for row in train]
    balance = BALANCE_LOSS if experts else 0.0
    for pairs, steps, lr in ((right, right_steps, RIGHT_LR), (doubtful, doubtful_steps, DOUBTFUL_LR)):
        teach(model, tokenizer, pairs, steps, lr, seed, router_aux_loss_coef=balance)
    save_model(model, raw, tokenizer, directory / "model")


def partial_sum_rows(count: int, terms: int, seed: int) -> list[Row]:
    """``count`` different prompts with their answers."""
    draw = random.Random(seed)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        prompts[tuple(draw.randrange(10) for _ in range(terms))] = None
    return [Row("+".join(map(str, digits)) + "=", DATA_SOURCE, _partial_sums(digits)) for digits in prompts]


def _partial_sums(digits: tuple[int, ...]) -> str:
    return "".join(str(sum(digits[: i + 1]) % 10) for i in range(len(digits)))


def doubtful_answer(prompt: str, doubt: float, draw: random.Random) -> str:
    """The answer to ``prompt`` that goes astray at every digit with probability ``doubt``, and on from there."""
    total, answer = 0, ""
    for digit in prompt.removesuffix("=").split("+"):
        total += int(digit)
        if draw.random() < doubt:
            total += draw.choice((-2, -1, 1, 2))
        total %= 10
        answer += str(total)
    return answer
