"""A policy loss that is elementwise in the log-probability: the head's gradients are taken while its logits exist.

The derivative of such a loss is known as soon as a token's log-probability is, so the LM head needs three products
instead of the four of a forward whose backward recomputes the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vexact.algorithms import PER_TOKEN_LOSSES, Denominators, token_weights
from vexact.models import ModelConfig
from vexact.training.batches.batch import PackedBatch, PolicyTargets
from vexact.training.config import ActorConfig
from vexact.training.passes.loss import policy_terms

MAX_ACCUMULATOR_BYTES = 3 << 29
"""The head's gradient is accumulated in fp32. Above 1.5 GiB that memory is worth more than the product it saves."""


def applies(config: ActorConfig, model: ModelConfig) -> bool:
    """Whether a token's loss depends on its own log-probability alone, and the head is not too large."""
    elementwise = config.loss_mode in PER_TOKEN_LOSSES and config.entropy_coeff == 0
    return elementwise and 4 * model.vocab_size * model.hidden_size <= MAX_ACCUMULATOR_BYTES


def with_derivative(
    batch: PackedBatch, targets: PolicyTargets, config: ActorConfig, denominators: Denominators
) -> PackedBatch:
    """``batch`` whose targets carry the derivative of the loss of ``micro_batch_loss``."""
    weights = token_weights(batch.response_lengths, config.agg_mode, denominators)  # (R,)

    def dloss(logprobs: Tensor, tokens: slice) -> Tensor:
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            policy, kl = policy_terms(leaf, targets.at(tokens), batch.response_lengths, config)
            losses = policy.losses if kl is None else policy.losses + config.kl_loss_coef * kl
            (gradient,) = torch.autograd.grad((losses * weights[tokens]).sum(), leaf)
        return gradient

    return replace(batch, targets=replace(batch.targets, dloss=dloss))
