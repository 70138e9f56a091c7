"""A loss that evens out the load of experts, one sequence at a time; only its gradient takes part in the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vexact.ops.cpu.reduce import tree_sum


def sequence_loads(experts: Tensor, sequence: Tensor, num_sequences: int, num_experts: int) -> Tensor:
    """How often each of B sequences chose each expert: whole numbers, whose sum has no order.

    Args:
        experts: (T, k) int32, all of them experts.
        sequence: (T,) int64, the sequence of each token; B for a token of none, which is not counted.

    Returns:
        (B, E) int64.
    """
    counts = torch.zeros((num_sequences + 1) * num_experts, dtype=torch.int64, device=experts.device)
    places = (sequence.unsqueeze(1) * num_experts + experts).flatten()
    counts.scatter_add_(0, places, torch.ones_like(places))
    return counts.view(-1, num_experts)[:-1]


def with_balance_loss(
    weights: Tensor, logits: Tensor, loads: Tensor, shares: Tensor, sequence: Tensor, scoring: str, coefficient: float
) -> tuple[Tensor, Tensor]:
    """The sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), added to ``weights`` as a
    gradient: they come back as they are, and in the backward ``logits`` get that of coefficient * loss besides.

    With s'_t the scores of token t over their sum (softmax scores are), a sequence of T_b tokens has the loss
    sum_i f_i P_i, P_i the mean of s'_ti over its tokens and f_i = E / (k T_b) times how often it chose expert i: 1 when
    balanced. No gradient flows through f, so a token's is a function of its own logits and of its sequence's counts.

    Args:
        weights: (T, k), on the way to the loss of the model. logits: (T, E) fp32.
        loads: (B + 1, E) fp32, f of every sequence; the last row is that of tokens of none.
        shares: (B + 1,) fp32, what a token of each sequence counts for.
        sequence: (T,) int64.

    Returns:
        ``weights``, and (T,) fp32 without gradient: share * sum_i f_i s'_ti, which add up to the loss.
    """
    out, values = _Balance.apply(weights, logits, loads, shares, sequence, scoring, coefficient)
    return out, values


def balance_loss_reference(
    logits: Tensor, experts: Tensor, loads: Tensor, shares: Tensor, sequence: Tensor, scoring: str
) -> Tensor:
    """The loss in fp64, differentiable in ``logits``."""
    wide = logits.double()
    scores = wide.softmax(1) if scoring == "softmax" else wide.sigmoid()
    scores = scores / scores.sum(1, keepdim=True)
    return (shares.double()[sequence] * (loads.double()[sequence] * scores).sum(1)).sum()


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        logits: Tensor,
        loads: Tensor,
        shares: Tensor,
        sequence: Tensor,
        scoring: str,
        coefficient: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, loads, shares, sequence)
        ctx.scoring, ctx.coefficient = scoring, coefficient
        values = shares[sequence] * tree_sum(loads[sequence] * _shares_of(_scores(logits, scoring), scoring))
        ctx.mark_non_differentiable(values)
        return weights.view_as(weights), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor, _dvalues: Tensor) -> tuple[Tensor | None, ...]:
        logits, loads, shares, sequence = ctx.saved_tensors
        scores = _scores(logits, ctx.scoring)
        normal, load = _shares_of(scores, ctx.scoring), loads[sequence]
        dlogits = normal * (load - tree_sum(load * normal).unsqueeze(1))
        if ctx.scoring == "sigmoid":
            dlogits = dlogits * (1.0 - scores)
        return dweights, dlogits * (ctx.coefficient * shares[sequence]).unsqueeze(1), *(None,) * 5


def _scores(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "sigmoid":
        return logits.sigmoid()
    exponentials = (logits - logits.amax(1, keepdim=True)).exp()
    return exponentials / tree_sum(exponentials).unsqueeze(1)


def _shares_of(scores: Tensor, scoring: str) -> Tensor:
    """Scores over their sum."""
    return scores if scoring == "softmax" else scores / tree_sum(scores).unsqueeze(1)
