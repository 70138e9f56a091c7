"""Stages 5 and 6 of a step: rewards, reference log-probabilities and advantages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vexact.algorithms import AdvantageConfig, AdvantageInputs, advantage_estimator, kl_penalty, overlong_penalty
from vexact.config import Config
from vexact.report.metrics import summary
from vexact.training import Reference
from vexact.types import SampleGroup, TrainSequence


def train_sequences(
    config: Config, groups: Sequence[SampleGroup], reference: Reference | None
) -> tuple[list[TrainSequence], dict[str, float]]:
    """Every sample with its per-token advantages (and reference log-probabilities when a KL term is on).

    Returns:
        The sequences, group-major, and ``critic/rewards/*`` inputs: metrics of the rewards that were trained on.
    """
    samples = [sample for group in groups for sample in group.samples]
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    sequences = [TrainSequence(sample, np.zeros(len(sample.token_ids), np.float32)) for sample in samples]
    references = reference.logprobs(sequences) if reference is not None else [None] * len(samples)
    penalty = _kl_in_reward(config, sequences, references) if config.algorithm.use_kl_in_reward else None
    inputs = AdvantageInputs(
        rewards=_rewards(config, groups, lengths),
        group_ids=torch.tensor([i for i, group in enumerate(groups) for _ in group.samples]),
        lengths=lengths,
        kl_penalty=penalty,
    )
    algorithm = config.algorithm
    settings = AdvantageConfig(gamma=algorithm.gamma, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo)
    advantages = advantage_estimator(algorithm.adv_estimator)(inputs, settings).numpy()
    parts = np.split(advantages, lengths.cumsum(0)[:-1].numpy())
    trained = [TrainSequence(sample, part, ref) for sample, part, ref in zip(samples, parts, references, strict=True)]
    return trained, _metrics(config, inputs.outcomes().numpy(), penalty)


def _rewards(config: Config, groups: Sequence[SampleGroup], lengths: Tensor) -> Tensor:
    rewards = torch.tensor([score.value for group in groups for score in group.scores], dtype=torch.float32)
    overlong = config.reward.reward_kwargs.overlong_buffer_cfg
    if overlong.enable:
        limit = config.data.max_response_length
        rewards += overlong_penalty(lengths, limit, overlong.len, overlong.penalty_factor)
    return rewards


def _kl_in_reward(
    config: Config, sequences: Sequence[TrainSequence], references: Sequence[np.ndarray | None]
) -> Tensor:
    policy = torch.from_numpy(np.concatenate([sequence.sample.logprobs for sequence in sequences]))
    reference = torch.from_numpy(np.concatenate([ref for ref in references if ref is not None]))
    return kl_penalty(policy, reference, config.algorithm.kl_penalty) * config.algorithm.kl_ctrl.kl_coef


def _metrics(config: Config, outcomes: np.ndarray, penalty: Tensor | None) -> dict[str, float]:
    metrics = summary("critic/rewards", outcomes)
    if penalty is not None:
        coefficient = config.algorithm.kl_ctrl.kl_coef
        metrics["actor/reward_kl_penalty"] = float(penalty.mean()) / coefficient if coefficient else 0.0
        metrics["actor/reward_kl_penalty_coeff"] = coefficient
    return metrics
