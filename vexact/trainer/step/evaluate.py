"""Validation: mean@k over the held-out prompts."""

from __future__ import annotations

from vexact.config import Config
from vexact.report.metrics import validation_metrics
from vexact.trainer.step.collect import sample_groups, score_groups
from vexact.trainer.step.sampling import validation_sampling
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
    scored = score_groups(workers, groups)
    workers.engine.stats()  # the next step's metrics are about training
    workers.rewards.take_metrics()
    return validation_metrics(scored), scored
