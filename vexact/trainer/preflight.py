"""What is checked before the first step, while a mistake is still cheap."""

from __future__ import annotations

import logging

from vexact.config import Config
from vexact.reward.spec import GradeRequest
from vexact.trainer.workers import Workers

log = logging.getLogger(__name__)
_DRY_RUN_ROWS = 8


def check_rewards(config: Config, workers: Workers) -> None:
    """Grades the ground truths and an empty answer of the first rows.

    Raises:
        RewardError: the grader fails on every one of them.
    """
    prompts = [workers.train_data[row] for row in range(min(_DRY_RUN_ROWS, len(workers.train_data)))]
    requests = [
        GradeRequest(prompt.data_source, answer, prompt.ground_truth, prompt.extra_info)
        for prompt in prompts
        for answer in (_as_text(prompt.ground_truth), "")
    ]
    scores = workers.rewards.score(requests)
    workers.rewards.take_metrics()
    right, empty = [score.value for score in scores[::2]], [score.value for score in scores[1::2]]
    if max(right) <= min(empty):
        log.info("reward dry run: no ground truth scores above an empty answer (ground truths may be unformatted)")


def _as_text(truth: object) -> str:
    return truth if isinstance(truth, str) else str(truth)
