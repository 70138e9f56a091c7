"""The user's data and reward, tried on a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vexact.audit.doctor.result import CheckResult, error, ok, warning
from vexact.reward.spec import RewardError
from vexact.types import Prompt, Score

DATA_ROWS, REWARD_ROWS = 100, 8
Grade = Callable[[Sequence[Prompt]], tuple[list[Score], list[Score]]]


class Prompts(Protocol):
    """What a PromptDataset offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Prompt: ...


def check_data(load: Callable[[], Prompts]) -> tuple[CheckResult, list[Prompt]]:
    """
    Args:
        load: reads and tokenises the first rows.

    Returns:
        The line, and the prompts for the reward dry run.
    """
    try:
        loaded = load()
    except (ValueError, OSError) as problem:
        return error("data", " ".join(str(problem).split()), "see the message; docs/configuration.md, section data"), []
    prompts = [loaded[index] for index in range(len(loaded))]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    sources = sorted({prompt.data_source for prompt in prompts})
    text = f"{len(prompts)} rows parsed, prompts of {min(lengths)} to {max(lengths)} tokens"
    return ok("data", f"{text}, data_source {', '.join(sources)}"), prompts


def check_rewards(grade: Grade, prompts: Sequence[Prompt]) -> CheckResult:
    """
    Args:
        grade: scores of the ground truths given as answers, and of empty answers.
    """
    fix = "see the message; reward.custom_reward_function names a grader of your own"
    try:
        right, empty = grade(prompts[:REWARD_ROWS])
    except (RewardError, ValueError) as problem:
        return error("reward", " ".join(str(problem).split()), fix)
    failed = [score for score in (*right, *empty) if score.status != "ok"]
    if failed:
        total = len(right) + len(empty)
        return error("reward", f"{len(failed)} of {total} answers could not be graded: {failed[0].message}", fix)
    means = [sum(score.value for score in scores) / len(scores) for scores in (right, empty)]
    text = f"mean score {means[0]:.3g} for the ground truths, {means[1]:.3g} for empty answers, {len(right)} rows"
    if means[0] <= means[1]:
        return warning(
            "reward", text, "check the grader, unless it expects a format that the bare ground truth does not have"
        )
    return ok("reward", text)
