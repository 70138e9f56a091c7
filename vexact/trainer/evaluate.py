"""Validation: mean@k over the held-out prompts."""

from __future__ import annotations

from vexact.config import Config
from vexact.report.metrics import validation_metrics
from vexact.rollout import SamplingParams
from vexact.trainer.collect import sample_groups, score_groups
from vexact.trainer.workers import Workers
from vexact.types import SampleGroup


def evaluate(config: Config, workers: Workers) -> tuple[dict[str, float], list[SampleGroup]]:
    """``val-core/*`` and ``val-aux/*`` under the rollout's present weights, and the groups behind them.

    Request ids do not depend on the step, so two validations of the same weights sample the same tokens.
    """
    if workers.val_data is None:
        return {}, []
    sampling = validation_sampling(config)
    prompts = [workers.val_data[row] for row in range(len(workers.val_data))]
    groups = sample_groups(workers, prompts, sampling, [f"val-row{prompt.row}" for prompt in prompts])
    workers.engine.stats()  # the next step's rollout metrics are about training
    scored = score_groups(workers, groups)
    return validation_metrics(scored), scored


def validation_sampling(config: Config) -> SamplingParams:
    """``rollout.val_kwargs`` as the engine takes them. Raises ValueError for what it refuses."""
    settings = config.rollout.val_kwargs
    return SamplingParams(
        n=settings.n,
        max_tokens=config.data.max_response_length,
        temperature=settings.temperature if settings.do_sample else 0.0,
        top_p=settings.top_p if settings.do_sample else 1.0,
        top_k=settings.top_k if settings.do_sample else -1,
        min_p=settings.min_p if settings.do_sample else 0.0,
        stop=list(config.rollout.stop) or None,
        stop_token_ids=list(config.rollout.stop_token_ids) or None,
    )
