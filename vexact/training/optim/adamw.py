"""One AdamW step whose bits for an element do not depend on where the element lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from vexact.training.config import OptimConfig

_BLOCK = 1 << 16
"""Elements at a time on the host: the four tensors and a scratch one stay in a processor's cache."""


@torch.no_grad()
def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    num_steps: int,
    lr: float,
    config: OptimConfig,
) -> None:
    """Loshchilov & Hutter 2019, as ``torch.optim.AdamW``; changes flat weights (n,) and moments in place.

    On a GPU torch's fused kernel treats every element alike. Its CPU kernel does not: what is left over after whole
    vectors is contracted to fused multiply-adds in another way, and a shard has other ends than a whole tensor. There
    every operation is one of its own.

    Args:
        num_steps: of these weights, with this one.
    """
    if weights[0].is_cuda or weights[0].dtype != torch.float32:
        steps = torch.full((len(weights),), num_steps - 1.0, dtype=torch.float32, device=weights[0].device)
        adamw(
            list(weights),
            list(gradients),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=lr,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )
        return
    for tensors in zip(weights, gradients, exp_avgs, exp_avg_sqs, strict=True):
        for block in zip(*(tensor.split(_BLOCK) for tensor in tensors), strict=True):
            _step_block(block, num_steps, lr, config)


def _step_block(block: tuple[Tensor, ...], num_steps: int, lr: float, config: OptimConfig) -> None:
    weight, gradient, exp_avg, exp_avg_sq = block
    beta1, beta2 = config.betas
    change = (gradient - exp_avg).mul_(1 - beta1)
    exp_avg.add_(change)
    torch.mul(gradient, gradient, out=change).mul_(1 - beta2)
    exp_avg_sq.mul_(beta2).add_(change)
    torch.sqrt(exp_avg_sq, out=change).mul_(1 / math.sqrt(1 - beta2**num_steps)).add_(config.eps)
    torch.div(exp_avg, change, out=change).mul_(lr / (1 - beta1**num_steps))
    weight.mul_(1 - lr * config.weight_decay).sub_(change)
