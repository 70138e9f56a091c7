"""What a run reads before its model: tokenizer and rows; and the graders."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from vexact.config import Config
from vexact.data import ColumnNames, PromptDataset, PromptFormat
from vexact.data.chat_template import KEY as CHAT_TEMPLATE_KEY
from vexact.data.chat_template import ChatTemplate, read_template
from vexact.data.tasks import is_task, parse_task
from vexact.models import ModelConfig
from vexact.models.tokenizer import read_tokenizer
from vexact.reward.pool import RewardPool
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.spec import RewardSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before its model: cheap, and where most mistakes are."""

    tokenizer: Any
    train_data: PromptDataset
    val_data: PromptDataset | None


def load_inputs(config: Config) -> Inputs:
    """Tokenizer, training rows and validation rows.

    Raises:
        ValueError, FileNotFoundError: what the user has to fix, named.
    """
    ModelConfig.from_hf_dir(config.model.path)  # the tokenizer reads it too, but cannot say what is wrong in it
    tokenizer, data = load_tokenizer(config), config.data
    train_data = _load_named("data.train_files", config, tokenizer, data.train_files, data.train_max_samples)
    if len(train_data) < data.train_batch_size and not config.trainer.val_only:
        log.warning(
            "data.train_batch_size=%d is more than the %d training rows, so a step holds the same prompt several "
            "times; lower it, or give more rows",
            data.train_batch_size,
            len(train_data),
        )
    val_data = None
    if data.val_files:
        val_data = _load_named("data.val_files", config, tokenizer, data.val_files, data.val_max_samples)
        _warn_of_trained_validation(config, train_data, val_data)
    return Inputs(tokenizer, train_data, val_data)


def _warn_of_trained_validation(config: Config, train_data: PromptDataset, val_data: PromptDataset) -> None:
    trained = {train_data[row].token_ids for row in range(len(train_data))}
    shared = sum(val_data[row].token_ids in trained for row in range(len(val_data)))
    if not shared or config.trainer.val_only:
        return
    files = config.data.train_files, config.data.val_files
    tasks = [{parse_task(name).name for name in names if is_task(name)} for names in files]
    hint = ""
    if tasks[0] & tasks[1]:
        hint = "; most tasks make row i of seed + i, so give seeds that are further apart than size"
    log.warning(
        "%d of the %d prompts of data.val_files are prompts of data.train_files, too, so validation is in part of what "
        "was trained on%s",
        *(shared, len(val_data), hint),
    )


def num_steps(config: Config, num_rows: int) -> int:
    """Training steps of the whole run: ``total_training_steps``, else as many as ``total_epochs`` hold."""
    if config.trainer.total_training_steps is not None:
        return config.trainer.total_training_steps
    return max(1, config.trainer.total_epochs * num_rows // config.data.train_batch_size)


def load_tokenizer(config: Config) -> Any:
    """The checkpoint's tokenizer, with ``custom_chat_template`` (Jinja, or a file of it) put in and looked at.

    Raises:
        ValueError: the directory holds none or a broken one, or the chat template is broken or leaves out what a user
            says.
    """
    path = config.model.tokenizer_path or config.model.path
    origin = f"the chat template of the tokenizer in {path}"
    try:
        tokenizer = read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; actor_rollout_ref.model.tokenizer_path names another directory") from error
    if config.model.custom_chat_template is not None:
        origin = CHAT_TEMPLATE_KEY
        tokenizer.chat_template = read_template(config.model.custom_chat_template)
    if tokenizer.chat_template:
        ChatTemplate(tokenizer, config.data.apply_chat_template_kwargs, origin).check()
    return tokenizer


def load_dataset(config: Config, tokenizer: Any, files: tuple[str, ...], max_samples: int) -> PromptDataset:
    """The first ``max_samples`` prompts (-1: all) of ``files``, as ``data.*`` says. Raises ValueError for bad rows."""
    data = config.data
    columns = ColumnNames(prompt=data.prompt_key, answer=data.answer_key, data_source=data.reward_fn_key)
    form = PromptFormat(
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong_prompts=data.filter_overlong_prompts,
        apply_chat_template_kwargs=data.apply_chat_template_kwargs,
    )
    return PromptDataset.from_files(
        files,
        tokenizer,
        columns=columns,
        form=form,
        max_samples=max_samples,
        custom_reward=config.reward.custom_reward_function.path is not None,
    )


def first_rows(config: Config, max_samples: int, most: int) -> int:
    """How many rows to read for a look at ``most`` of them, -1 for all: those that are filtered are none to look at."""
    if config.data.filter_overlong_prompts:
        return max_samples
    return most if max_samples < 0 else min(most, max_samples)


def _load_named(key: str, config: Config, tokenizer: Any, files: tuple[str, ...], max_samples: int) -> PromptDataset:
    try:
        return load_dataset(config, tokenizer, files, max_samples)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def start_rewards(config: Config) -> RewardPool:
    """The grader processes. Raises RewardError when the user's function cannot be loaded."""
    custom = config.reward.custom_reward_function
    policy = SandboxPolicy(**asdict(config.reward.sandbox))
    spec = RewardSpec(custom.path, custom.name, custom.reward_kwargs, policy)
    return RewardPool(config.reward.num_workers, spec, config.reward.timeout_s)
