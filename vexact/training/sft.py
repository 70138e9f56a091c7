"""A short supervised warm-up: next-token loss on (prompt, answer) pairs, through the forward that RL uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vexact import interrupt
from vexact.models import CausalLM, NonFiniteError
from vexact.models.nonfinite import find_nonfinite
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.config import OptimConfig
from vexact.training.optim.optimizer import Optimizer
from vexact.training.parallel.ranks import Ranks
from vexact.training.passes.experts import ExpertWatch, update_router_bias
from vexact.training.passes.forward import routed_scores

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Prompt token ids, answer token ids; only answer tokens are trained."""


@dataclass(frozen=True, slots=True)
class SupervisedConfig:
    """Plain AdamW on batches drawn without replacement per pass over the data. Experts are balanced as in the actor."""

    batch_size: int = 64
    grad_clip: float = 1.0
    seed: int = 0
    router_aux_loss_coef: float = 0.0
    router_bias_update_rate: float = 0.0
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.0))


def supervised_steps(
    model: CausalLM, pairs: Sequence[TokenPair], num_steps: int, config: SupervisedConfig
) -> list[float]:
    """Trains ``model`` in place for ``num_steps`` and returns the mean negative log-likelihood per token of each step.

    The result depends on the arguments only. Raises ValueError when there are no pairs, NonFiniteError when a gradient
    or, at the end, a weight is not finite.
    """
    if not pairs:
        raise ValueError("supervised_steps got no (prompt, answer) pairs")
    device = model.lm_head_weight.device
    sequences = [TokenSequence(prompt, answer) for prompt, answer in pairs]
    optimizer, ranks = Optimizer(model.parameters(), config.optim), Ranks(None, device)
    losses = []
    for step in range(num_steps):
        interrupt.check()
        batch = pack_tokens([sequences[i] for i in _draw(len(pairs), step, config)], device)
        optimizer.set_lr(config.optim.lr_at(step))
        optimizer.zero_grad()
        watch = _watch_experts(model, config, len(batch.response_lengths), ranks)
        scores, _ = routed_scores(model, batch, None if watch is None else watch.begin(batch))
        loss = -scores.logprobs.mean()
        loss.backward()
        if watch is not None:
            watch.end(batch)
        norm = optimizer.step(config.grad_clip)
        if not math.isfinite(norm):
            raise NonFiniteError(f"warm-up step {step}: the gradient norm is {norm}; lower the learning rate")
        if watch is not None and config.router_bias_update_rate:
            update_router_bias(model, watch.total(), config.router_bias_update_rate, ranks)
        losses.append(loss.detach())
    optimizer.zero_grad()
    if (found := find_nonfinite(model.named_parameters())) is not None:
        raise NonFiniteError(f"after the warm-up, {found}; lower the learning rate")
    return torch.stack(losses).tolist() if losses else []


def _watch_experts(model: CausalLM, config: SupervisedConfig, num_sequences: int, ranks: Ranks) -> ExpertWatch | None:
    if not model.chooses_experts:
        return None
    return ExpertWatch(model.config, config.router_aux_loss_coef, num_sequences, ranks)


def _draw(num_pairs: int, step: int, config: SupervisedConfig) -> list[int]:
    """Indices of one batch: consecutive slices of a fresh permutation per pass, a pure function of (seed, step)."""
    size = min(config.batch_size, num_pairs)
    per_pass = num_pairs // size
    order = np.random.default_rng([config.seed, step // per_pass]).permutation(num_pairs)
    start = step % per_pass * size
    return order[start : start + size].tolist()
