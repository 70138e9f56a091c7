"""Stages 1-4 of a step: prompts, samples, scores, and under dynamic sampling the groups worth training on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from vexact.algorithms import informative_groups
from vexact.config import Config
from vexact.reward.seal import require_seals, sample_key
from vexact.reward.spec import GradeRequest
from vexact.rollout import SamplingParams
from vexact.rollout.requests.request import draw_settings
from vexact.trainer.step.penalty import overlong_penalties
from vexact.trainer.step.sampling import training_sampling
from vexact.trainer.workers import EngineGroup, PendingSamples, Workers
from vexact.types import DrawSettings, Prompt, Sample, SampleGroup, Score

log = logging.getLogger(__name__)
MANY_BATCHES = 10  # generation batches of one step, after which a search without a limit says that it is one
Timer = Callable[[str], AbstractContextManager[None]]


class Collected(NamedTuple):
    """The groups to train on, all groups that were sampled, the cursor after the prompts consumed, and what engines
    and graders say of their work."""

    groups: list[SampleGroup]
    sampled: list[SampleGroup]
    cursor: int
    metrics: dict[str, float]


class _Batch(NamedTuple):
    prompts: list[Prompt]
    ids: list[str]
    pending: PendingSamples | None = None


class DynamicSamplingError(RuntimeError):
    """Dynamic sampling ran out of generation batches."""


class Collector:
    """Fills a step with scored groups. The data cursor is the caller's to keep."""

    def __init__(self, config: Config, workers: Workers, timer: Timer) -> None:
        self.config, self.workers, self.timer = config, workers, timer
        self.sampling = training_sampling(config)
        self._has_warned = False
        self._begun: _Batch | None = None  # the first batch of a step, being sampled

    def begin(self, step: int, cursor: int) -> None:
        """Starts to sample what ``collect`` of this step begins with, and returns; of a group of engines."""
        assert self._begun is None, "one step at a time"
        assert isinstance(self.workers.engine, EngineGroup), "one engine does not sample beside the training"
        batch = self._next(step, 0, self.workers.order.take(cursor, self.config.data.train_batch_size))
        prompts = [prompt.token_ids for prompt in batch.prompts]
        pending = self.workers.engine.start_generate(prompts, self.sampling, batch.ids, f"generation of step {step}")
        self._begun = batch._replace(pending=pending)

    def collect(self, step: int, cursor: int) -> Collected:
        """Samples until ``train_batch_size`` groups are there.

        Raises:
            DynamicSamplingError: ``filter_groups.max_num_gen_batches`` did not yield enough groups.
        """
        wanted, settings = self.config.data.train_batch_size, self.config.algorithm.filter_groups
        kept: list[SampleGroup] = []
        everything: list[SampleGroup] = []
        num_batches = 0
        while len(kept) < wanted:
            if settings.enable and num_batches and num_batches == settings.max_num_gen_batches:
                raise DynamicSamplingError(
                    f"after {num_batches} generation batches only {len(kept)} of {wanted} prompts have samples "
                    f"that differ in {settings.metric or 'score'}; the data is too easy or too hard for this model, or "
                    f"raise algorithm.filter_groups.max_num_gen_batches={num_batches} (0 never gives up)"
                )
            if num_batches == MANY_BATCHES and settings.max_num_gen_batches <= 0:
                self._warn_of_search(step, len(kept), wanted)
            groups = self._batch(step, num_batches, self.workers.order.take(cursor, wanted))
            cursor, num_batches = cursor + wanted, num_batches + 1
            everything += groups
            kept += self._informative(groups) if settings.enable else groups
        metrics = self.workers.engine.stats() | self.workers.rewards.take_metrics()
        return Collected(kept[:wanted], everything, cursor, metrics)

    def draw_settings(self, request_id: str) -> DrawSettings:
        """How the request of this id must have been sampled."""
        return draw_settings(self.sampling, self.config.rollout_seed, request_id)

    def _warn_of_search(self, step: int, kept: int, wanted: int) -> None:
        if not self._has_warned:
            log.warning(
                "step %d: after %d generation batches only %d of %d prompts have samples that differ in %s, and "
                "there is no limit; the data may be too easy or too hard for this model "
                "(algorithm.filter_groups.max_num_gen_batches sets one)",
                *(step, MANY_BATCHES, kept, wanted, self.config.algorithm.filter_groups.metric or "score"),
            )
        self._has_warned = True

    def _batch(self, step: int, number: int, rows: Sequence[int]) -> list[SampleGroup]:
        batch, begun, self._begun = self._next(step, number, rows), self._begun, None
        with self.timer("gen"):
            if begun is not None and begun.pending is not None:
                assert begun.ids == batch.ids, "what was begun is what is collected"
                groups = grouped(batch.prompts, begun.pending.result(), self.sampling.n)
            else:
                with self.workers.profiler("rollout", batch.ids[0]):
                    groups = sample_groups(self.workers, batch.prompts, self.sampling, batch.ids)
        with self.timer("reward"):
            return score_groups(self.workers, groups)

    def _next(self, step: int, number: int, rows: Sequence[int]) -> _Batch:
        prompts = [self.workers.train_data[row] for row in rows]
        return _Batch(prompts, [f"step{step}-{number * len(rows) + i}-row{row}" for i, row in enumerate(rows)])

    def _informative(self, groups: list[SampleGroup]) -> list[SampleGroup]:
        values = [
            [filter_metric(self.config, score, len(s.token_ids)) for score, s in zip(group.scores, group.samples)]
            for group in groups
        ]
        return [groups[i] for i in informative_groups(values)]


def sample_groups(
    workers: Workers, prompts: Sequence[Prompt], sampling: SamplingParams, request_ids: Sequence[str]
) -> list[SampleGroup]:
    """n samples of every prompt."""
    samples = workers.engine.generate([prompt.token_ids for prompt in prompts], sampling, request_ids)
    return grouped(prompts, samples, sampling.n)


def grouped(prompts: Sequence[Prompt], samples: Sequence[Sample], n: int) -> list[SampleGroup]:
    """The samples, n per prompt and in their order, with their prompts."""
    return [SampleGroup(prompt, tuple(samples[i * n : (i + 1) * n])) for i, prompt in enumerate(prompts)]


def score_groups(workers: Workers, groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """The same groups with scores. Raises SealError when a score is not its sample's."""
    flat = [(group.prompt, sample) for group in groups for sample in group.samples]
    requests = [
        GradeRequest(prompt.data_source, sample.text or "", prompt.ground_truth, prompt.extra_info, sample_key(sample))
        for prompt, sample in flat
    ]
    given = workers.rewards.score(requests)
    require_seals([sample for _, sample in flat], given, [request.key for request in requests])
    scores = iter(given)
    return [SampleGroup(group.prompt, group.samples, tuple(next(scores) for _ in group.samples)) for group in groups]


def filter_metric(config: Config, score: Score, num_tokens: int) -> float:
    """What dynamic sampling looks at in the score of a response of so many tokens.

    Raises ValueError when the reward returned no such key.
    """
    name = config.algorithm.filter_groups.metric or "score"
    if name == "score":
        return score.value
    if name == "reward":
        return score.value + float(overlong_penalties(config, torch.tensor([num_tokens])))
    if name not in score.extra and score.status == "ok":
        known = ", ".join(["score", "reward", *score.extra])
        raise ValueError(f"algorithm.filter_groups.metric={name}: the reward returned no such key, only {known}")
    return score.extra.get(name, 0.0)
