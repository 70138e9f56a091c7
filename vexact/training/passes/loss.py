"""The loss of one micro-batch, as its share of the whole mini-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vexact.algorithms import Denominators, PolicyLossInputs, PolicyLossOutput, kl_penalty, policy_loss, token_weights
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training.batches.batch import PackedBatch, PolicyTargets
from vexact.training.config import ActorConfig


def policy_terms(
    logprobs: Tensor, targets: PolicyTargets, lengths: Tensor, config: ActorConfig
) -> tuple[PolicyLossOutput, Tensor | None]:
    """Policy loss and KL penalty (None without ``use_kl_loss``) per token, of ``logprobs`` (R,) that carry gradients.

    Both are as corrected, where ``targets`` have scales.

    ``lengths`` (B,) are those of the sequences; only a loss outside ``PER_TOKEN_LOSSES`` reads them.
    """
    inputs = PolicyLossInputs(logprobs, targets.old_logprobs, targets.advantages, lengths)
    policy, scales = policy_loss(config.loss_mode)(inputs, config.clip), targets.scales
    if scales is not None:
        policy = replace(policy, losses=policy.losses * scales.policy)
    if not config.use_kl_loss:
        return policy, None
    assert targets.ref_logprobs is not None, "the actor checks for reference log-probs before it packs"
    kl = kl_penalty(logprobs, targets.ref_logprobs, config.kl_loss_type)
    return policy, kl if scales is None else kl * scales.others


def micro_batch_loss(
    scores: LinearCrossEntropy | TrainedCrossEntropy,
    batch: PackedBatch,
    targets: PolicyTargets,
    config: ActorConfig,
    denominators: Denominators,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy loss - entropy_coeff * entropy + kl_loss_coef * KL, and the metrics by verl's name without "actor/".

    Loss and metrics are scalars that add up to those of the mini-batch over all its micro-batches and ranks. Metrics
    are detached.
    """
    weights = token_weights(batch.response_lengths, config.agg_mode, denominators)  # (R,)
    policy, kl = policy_terms(scores.logprobs, targets, batch.response_lengths, config)
    loss = (policy.losses * weights).sum()
    shares = {"pg_loss": loss}
    if config.entropy_coeff != 0:
        entropy = scores.entropy if targets.scales is None else scores.entropy * targets.scales.others
        shares["entropy_loss"] = (entropy * weights).sum()
        loss = loss - config.entropy_coeff * shares["entropy_loss"]
    if kl is not None:
        shares["kl_loss"] = (kl * weights).sum()
        loss = loss + config.kl_loss_coef * shares["kl_loss"]
    shares["loss"] = loss
    per_token = policy.metrics | {"entropy": scores.entropy}
    shares |= {name: values.double().sum() / denominators.num_tokens for name, values in per_token.items()}
    return loss, {name: share.detach() for name, share in shares.items()}


class MiniBatchMetrics:
    """The shares of this rank's micro-batches; ``names`` are those of the first one added (the same on every rank)."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self.names: list[str] = []

    def add(self, shares: dict[str, Tensor]) -> None:
        self.names = list(shares)
        self._rows.append(torch.stack([share.double() for share in shares.values()]))

    @property
    def rows(self) -> Tensor:
        """(rounds, names) fp64; a filler has one, too."""
        return torch.stack(self._rows)


def mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that were taken (over all of them if none was), and how many were skipped."""
    taken = [step for step in steps if math.isfinite(step["grad_norm"])]
    counted = taken or steps
    means = {f"actor/{name}": sum(step[name] for step in counted) / len(counted) for name in counted[0]}
    return means | {"actor/skipped_steps": float(len(steps) - len(taken))}
