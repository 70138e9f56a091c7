"""What is checked before the first step, while a mistake is still cheap: training and validation alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

from vexact.config import Config
from vexact.config.memory import ModelShape
from vexact.config.plan import TRAINING_BYTES_PER_PARAMETER
from vexact.data import PromptDataset
from vexact.models import ModelConfig
from vexact.reward.pool import RewardPool
from vexact.reward.spec import GradeRequest, RewardError
from vexact.rollout import SamplingParams
from vexact.rollout.protocol import RolloutEngine
from vexact.trainer.step.collect import filter_metric, training_sampling
from vexact.trainer.step.evaluate import validation_sampling
from vexact.trainer.workers import Workers
from vexact.trainer.workers.groups import ActorGroup
from vexact.types import Prompt, Score

log = logging.getLogger(__name__)
_DRY_RUN_ROWS = 8


def checkpoint_bytes(config: Config) -> int:
    """Weights and two moments in the state, weights once more as safetensors, all fp32."""
    if config.trainer.val_only:
        return 0
    ModelConfig.from_hf_dir(config.model.path)  # names what is wrong with config.json
    return ModelShape.read(config.model.path).num_parameters * TRAINING_BYTES_PER_PARAMETER


def check_before_training(config: Config, workers: Workers) -> None:
    """Where checkpoints go, sampling settings, every prompt, and the graders of all kinds of rows.

    Raises:
        ValueError: a rank could not write checkpoints, or the engine would refuse the settings or a prompt.
        RewardError: a grader fails on every row tried of one ``data_source``.
    """
    if isinstance(workers.actor, ActorGroup) and not config.trainer.val_only:
        check_shared(config.run_dir, workers.actor)
    check_sampling("actor_rollout_ref.rollout", lambda: training_sampling(config))
    check_sampling("actor_rollout_ref.rollout.val_kwargs", lambda: validation_sampling(config))
    for key, data in _datasets(workers):
        check_prompts(key, data, workers.engine, config.data.max_response_length)
        scores = check_graders(key, data, workers.rewards)
        if data is workers.train_data:
            require_metric(config, scores)


def check_shared(run_dir: Path, actor: ActorGroup) -> None:
    """Raises ValueError naming a rank that has another run directory, and would write its checkpoints there."""
    with NamedTemporaryFile(dir=run_dir, prefix=".seen-") as file:
        blind = actor.blind_to(run_dir / Path(file.name).name)  # relative, if the directory was given so
    if blind:
        raise ValueError(
            f"the run directory {run_dir} is not the driver's on {blind[0]}, so checkpoints could not be whole; point "
            "trainer.default_local_dir to a disk that all nodes share, by an absolute path"
        )


def check_sampling(section: str, build: Callable[[], SamplingParams]) -> None:
    """Raises ValueError, with the section's name, for settings that the sampler refuses."""
    try:
        build()
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from error


def check_prompts(key: str, data: PromptDataset, engine: RolloutEngine, max_response_length: int) -> None:
    """Raises ValueError for a prompt with ids the model does not have, or longer than the key-value cache holds."""
    check_token_ids(key, data, engine.vocab_size)
    cache = engine.num_cache_tokens
    for row in range(len(data)):
        ids = data[row].token_ids
        needed = len(ids) + max_response_length - 1  # the last sampled token is never fed back
        if needed > cache:
            raise ValueError(
                f"{key}, row {row}: {len(ids)} prompt tokens and data.max_response_length={max_response_length} need "
                f"{needed} tokens of key-value cache, and it holds {cache}; raise "
                "actor_rollout_ref.rollout.kv_cache_bytes or num_pages"
            )


def check_token_ids(key: str, data: PromptDataset, vocab_size: int) -> None:
    """Raises ValueError for a prompt with ids the model does not have."""
    for row in range(len(data)):
        ids = data[row].token_ids
        wrong = next((each for each in (min(ids), max(ids)) if not 0 <= each < vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"{key}, row {row} ({data[row].text!r:.60}): token id {wrong} is outside the model's vocabulary of "
                f"{vocab_size}; is the tokenizer this model's?"
            )


def check_graders(key: str, data: PromptDataset, rewards: RewardPool) -> list[Score]:
    """Grades the ground truths and an empty answer of the first rows of every ``data_source``; returns the scores.

    Raises:
        RewardError: the grader fails on every one of them.
    """
    by_source: dict[str, list[Prompt]] = {}
    scores: list[Score] = []
    for row in range(len(data)):
        prompts = by_source.setdefault(data[row].data_source, [])
        if len(prompts) < _DRY_RUN_ROWS:
            prompts.append(data[row])
    for source, prompts in by_source.items():
        try:
            right, empty = grade_rows(prompts, rewards)
        except RewardError as error:
            raise RewardError(f"{key}, rows of data_source {source!r}: {error}") from error
        scores += right + empty
        if max(score.value for score in right) <= min(score.value for score in empty):
            log.info(
                "reward dry run of %s (%s): no ground truth scores above an empty answer (ground truths may be "
                "unformatted)",
                key,
                source,
            )
    return scores


def require_metric(config: Config, scores: Sequence[Score]) -> None:
    """Raises ValueError when dynamic sampling looks at a key that the reward does not return."""
    if config.algorithm.filter_groups.enable:
        for score in scores:
            filter_metric(config, score, 0)


def grade_rows(prompts: Sequence[Prompt], rewards: RewardPool) -> tuple[list[Score], list[Score]]:
    """Scores of the ground truths given as answers, and of empty answers. Raises RewardError as ``score`` does."""
    requests = [
        GradeRequest(prompt.data_source, answer, prompt.ground_truth, prompt.extra_info)
        for prompt in prompts
        for answer in (_as_text(prompt.ground_truth), "")
    ]
    scores = rewards.score(requests)
    rewards.take_metrics()
    return scores[::2], scores[1::2]


def _datasets(workers: Workers) -> Iterator[tuple[str, PromptDataset]]:
    yield "data.train_files", workers.train_data
    if workers.val_data is not None:
        yield "data.val_files", workers.val_data


def _as_text(truth: object) -> str:
    return truth if isinstance(truth, str) else str(truth)
