"""Stages 5 and 6 of a step: rewards, reference log-probabilities and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vexact.algorithms import AdvantageConfig, AdvantageInputs, advantage_estimator, kl_penalty
from vexact.algorithms.packed import segment_sum
from vexact.config import Config
from vexact.report.metrics import summary
from vexact.reward.seal import require_seals
from vexact.trainer.step.penalty import overlong_penalties
from vexact.training import Ledger
from vexact.training.protocol import Scorer
from vexact.types import Sample, SampleGroup, TrainSequence


def train_sequences(
    config: Config,
    groups: Sequence[SampleGroup],
    reference: Scorer | None,
    recomputed: Sequence[np.ndarray] | None = None,
) -> tuple[list[TrainSequence], Ledger, dict[str, float]]:
    """Every sample with its per-token advantages (and reference log-probabilities when a KL term is on).

    ``recomputed`` are old log-probabilities to use in place of the rollout's, per sample (R,) fp32, group-major.

    Returns:
        The sequences, group-major; their checksums, which the actor compares with what its loss reads; and
        ``critic/rewards/*`` inputs: metrics of the rewards that were trained on.

    Raises:
        SealError: a score is not the one given for its sample.
        ValueError: a score, a log-probability of the trainer or the reference, or an advantage is not a finite number.
    """
    samples = [sample for group in groups for sample in group.samples]
    require_seals(samples, [score for group in groups for score in group.scores])
    lengths = torch.tensor([len(sample.token_ids) for sample in samples])
    old = [None] * len(samples) if recomputed is None else list(recomputed)
    _require_finite(samples, old, "the trainer")
    sequences = [
        TrainSequence(sample, np.zeros(len(sample.token_ids), np.float32), recomputed_logprobs=logprobs)
        for sample, logprobs in zip(samples, old, strict=True)
    ]
    references = reference.logprobs(sequences) if reference is not None else [None] * len(samples)
    _require_finite(samples, references, "the reference policy")
    kl = _kl_in_reward(config, sequences, references) if config.algorithm.use_kl_in_reward else None
    inputs = AdvantageInputs(
        rewards=_rewards(config, groups, lengths),
        group_ids=torch.tensor([i for i, group in enumerate(groups) for _ in group.samples]),
        lengths=lengths,
        kl_penalty=None if kl is None else kl * config.algorithm.kl_ctrl.kl_coef,
    )
    algorithm = config.algorithm
    settings = AdvantageConfig(gamma=algorithm.gamma, norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo)
    advantages = advantage_estimator(algorithm.adv_estimator)(inputs, settings).numpy()
    parts = np.split(advantages, lengths.cumsum(0)[:-1].numpy())
    trained = [
        replace(sequence, advantages=part, ref_logprobs=logprobs)
        for sequence, part, logprobs in zip(sequences, parts, references, strict=True)
    ]
    ledger = Ledger(trained)
    _require_finite_advantages(groups, trained)
    metrics = summary("critic/rewards", inputs.outcomes().numpy())
    if kl is not None:
        metrics["actor/reward_kl_penalty"] = float((segment_sum(kl.double(), lengths) / lengths).mean())
        metrics["actor/reward_kl_penalty_coeff"] = algorithm.kl_ctrl.kl_coef
    return trained, ledger, metrics


def _require_finite(samples: Sequence[Sample], per_sample: Sequence[np.ndarray | None], whose: str) -> None:
    for sample, logprobs in zip(samples, per_sample, strict=True):
        if logprobs is not None and not np.isfinite(logprobs).all():
            position = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            raise ValueError(
                f"request {sample.request_id}, response position {position}: {whose} gives token "
                f"{sample.token_ids[position]} the log-probability {logprobs[position]}"
            )


def _require_finite_advantages(groups: Sequence[SampleGroup], sequences: Sequence[TrainSequence]) -> None:
    scores = [group.scores for group in groups for _ in group.samples]
    for sequence, of_group in zip(sequences, scores, strict=True):
        if not np.isfinite(sequence.advantages).all():
            values = ", ".join(f"{score.value:g}" for score in of_group)
            raise ValueError(
                f"request {sequence.sample.request_id}: its advantage is {sequence.advantages[0]}, from the scores "
                f"{values} of its prompt; the reward function must return numbers that float32 can square"
            )


def _rewards(config: Config, groups: Sequence[SampleGroup], lengths: Tensor) -> Tensor:
    rewards = torch.tensor([score.value for group in groups for score in group.scores], dtype=torch.float32)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).nonzero()[0])
        sample, score = [pair for group in groups for pair in zip(group.samples, group.scores)][row]
        raise ValueError(f"request {sample.request_id}: its score {score.value!r} is no finite float32 number")
    return rewards + overlong_penalties(config, lengths)


def _kl_in_reward(
    config: Config, sequences: Sequence[TrainSequence], references: Sequence[np.ndarray | None]
) -> Tensor:
    """(T,) fp32, of every token, without its coefficient."""
    policy = torch.from_numpy(np.concatenate([sequence.old_logprobs for sequence in sequences]))
    reference = torch.from_numpy(np.concatenate([ref for ref in references if ref is not None]))
    return kl_penalty(policy, reference, config.algorithm.kl_penalty)
