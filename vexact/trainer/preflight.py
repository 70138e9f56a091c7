"""What is checked before the first step, while a mistake is still cheap."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vexact.config import Config
from vexact.reward.pool import RewardPool
from vexact.reward.spec import GradeRequest
from vexact.trainer.workers import Workers
from vexact.types import Prompt, Score

log = logging.getLogger(__name__)
_DRY_RUN_ROWS = 8


def check_rewards(config: Config, workers: Workers) -> None:
    """Grades the ground truths and an empty answer of the first rows.

    Raises:
        RewardError: the grader fails on every one of them.
    """
    prompts = [workers.train_data[row] for row in range(min(_DRY_RUN_ROWS, len(workers.train_data)))]
    right, empty = dry_run(prompts, workers.rewards)
    if max(score.value for score in right) <= min(score.value for score in empty):
        log.info("reward dry run: no ground truth scores above an empty answer (ground truths may be unformatted)")


def dry_run(prompts: Sequence[Prompt], rewards: RewardPool) -> tuple[list[Score], list[Score]]:
    """Scores of the ground truths given as answers, and of empty answers. Raises RewardError as ``score`` does."""
    requests = [
        GradeRequest(prompt.data_source, answer, prompt.ground_truth, prompt.extra_info)
        for prompt in prompts
        for answer in (_as_text(prompt.ground_truth), "")
    ]
    scores = rewards.score(requests)
    rewards.take_metrics()
    return scores[::2], scores[1::2]


def _as_text(truth: object) -> str:
    return truth if isinstance(truth, str) else str(truth)
