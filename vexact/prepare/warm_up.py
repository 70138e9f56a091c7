"""Small models from nothing: random weights, a supervised warm-up on texts, and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vexact.prepare.addition import Pair
from vexact.prepare.files import write_generation_config

BATCH_SIZE = 64


def new_model(raw: dict[str, Any], seed: int) -> Any:
    """With stock kernels: there is nothing to compare bits with yet, and they are the faster ones."""
    from vexact.models import ModelConfig, random_model

    return random_model(ModelConfig.from_hf_dict(raw), seed, ops="stock", attn_impl="sdpa")


def teach(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], num_steps: int, lr: float, seed: int, **balance: float
) -> None:
    """Trains ``model`` in place on (prompt, answer) texts.

    Args:
        lr: the highest; a few steps lead up to it, and the last has a twentieth.
        seed: of the order of the pairs.
        balance: what balances experts, as in ``SupervisedConfig``.
    """
    from vexact.training.config import OptimConfig
    from vexact.training.sft import SupervisedConfig, supervised_steps

    optim = OptimConfig(
        lr=lr,
        weight_decay=0.0,
        betas=(0.9, 0.98),
        lr_warmup_steps=min(30, num_steps // 4),
        lr_scheduler_type="linear",
        total_training_steps=num_steps,
        min_lr_ratio=0.05,
    )
    config = SupervisedConfig(batch_size=BATCH_SIZE, seed=seed, optim=optim, **balance)
    supervised_steps(model, [_encode(tokenizer, pair) for pair in pairs], num_steps, config)


def _encode(tokenizer: Any, pair: Pair) -> tuple[list[int], list[int]]:
    prompt, answer = pair
    return tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]


def save_model(model: Any, raw: dict[str, Any], tokenizer: Any, directory: Path) -> None:
    """With its tokenizer and the ids at which generation ends."""
    from vexact.models import ModelConfig, save_hf

    save_hf(model.named_parameters(), ModelConfig.from_hf_dict(raw), directory)
    write_generation_config(directory, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.save_pretrained(directory)
