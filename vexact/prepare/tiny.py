"""A tiny model, its tokenizer and an arithmetic task: everything a first run needs, made in half a minute.

The supervised warm-up has two parts. The first teaches sums. The second, short, shows the same prompts with answers of
which about a third are right and the others are off by one to three: now the model doubts, and a sampled answer is
right about three times in ten. What is left for reinforcement learning is to find out which of the answers pays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vexact.prepare.addition import addition_rows, doubtful_answers, right_answers
from vexact.prepare.files import write_parquet
from vexact.prepare.tiny_shapes import tiny_config, tiny_moe_config, tiny_moonlight_config
from vexact.prepare.tokenizers import character_tokenizer
from vexact.prepare.warm_up import new_model, save_model, teach

RIGHT_STEPS, DOUBTFUL_STEPS = 220, 60
RIGHT_LR, DOUBTFUL_LR = 1e-3, 2e-4
BALANCE_LOSS, BIAS_RATE = 0.05, 0.01  # or a few experts take all tokens


def write_tiny(
    directory: Path, seed: int = 0, right_steps: int = RIGHT_STEPS, doubtful_steps: int = DOUBTFUL_STEPS
) -> None:
    """Write ``model/``, ``train.parquet`` and ``test.parquet``; the same seed gives the same files on one machine.

    Args:
        seed: of the weights, the rows and the warm-up.
        right_steps: optimizer steps on right answers.
        doubtful_steps: optimizer steps on doubtful answers.

    Raises:
        ValueError: fewer than one step of either.
    """
    _write(directory, tiny_config, seed, right_steps, doubtful_steps)


def write_tiny_moe(
    directory: Path, seed: int = 0, right_steps: int = RIGHT_STEPS, doubtful_steps: int = DOUBTFUL_STEPS
) -> None:
    """The same with experts, as in Qwen3-MoE; a loss balances them."""
    _write(directory, tiny_moe_config, seed, right_steps, doubtful_steps, router_aux_loss_coef=BALANCE_LOSS)


def write_tiny_moonlight(
    directory: Path, seed: int = 0, right_steps: int = RIGHT_STEPS, doubtful_steps: int = DOUBTFUL_STEPS
) -> None:
    """The same with experts and latent attention, as in Moonlight; the correction bias balances the experts."""
    _write(directory, tiny_moonlight_config, seed, right_steps, doubtful_steps, router_bias_update_rate=BIAS_RATE)


def _write(
    directory: Path,
    config: Callable[[Any], dict[str, Any]],
    seed: int,
    right_steps: int,
    doubtful_steps: int,
    **balance: float,
) -> None:
    for name, steps in {"right_steps": right_steps, "doubtful_steps": doubtful_steps}.items():
        if steps < 1:
            raise ValueError(f"{name}={steps} must be at least 1")
    train, test = addition_rows(seed)
    write_parquet(train, directory / "train.parquet", "train")
    write_parquet(test, directory / "test.parquet", "test")
    tokenizer = character_tokenizer()
    raw = config(tokenizer)
    model = new_model(raw, seed)
    with _one_thread():
        teach(model, tokenizer, right_answers(train), right_steps, RIGHT_LR, seed, **balance)
        teach(model, tokenizer, doubtful_answers(train, seed), doubtful_steps, DOUBTFUL_LR, seed, **balance)
    save_model(model, raw, tokenizer, directory / "model")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums split over threads would round differently from machine to machine; nothing here is large enough to gain."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
