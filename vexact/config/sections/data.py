"""`data.*`: where prompts come from and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vexact.config.fields import LARGEST_64, opt


@dataclass(frozen=True)
class DataConfig:
    train_files: tuple[str, ...] = opt(
        (), "Training rows: .parquet or .jsonl files, or `reasoning_gym:TASK?size=2000&seed=1`; one or a list."
    )
    val_files: tuple[str, ...] = opt((), "Validation rows, same forms; empty means no validation.")
    train_max_samples: int = opt(-1, "Use only the first so many training rows; -1 uses all.", ge=-1)
    val_max_samples: int = opt(-1, "Use only the first so many validation rows; -1 uses all.", ge=-1)
    prompt_key: str = opt(
        "prompt", "Column with the prompt: a string or a list of {role, content}; content is a string or text parts."
    )
    answer_key: str | None = opt(
        None, "Column with the answer, for plain datasets without `reward_model.ground_truth`."
    )
    reward_fn_key: str = opt("data_source", "Column that names the grader of a row.")
    max_prompt_length: int = opt(512, "Longest prompt in tokens.", ge=1)
    max_response_length: int = opt(512, "Longest response in tokens.", ge=1)
    train_batch_size: int = opt(32, "Prompts per step; each is sampled rollout.n times.", verl=1024, ge=1)
    shuffle: bool = opt(True, "Shuffle the rows anew in every epoch; the order depends on the seed only.")
    seed: int | None = opt(None, "Seed of the data order; null takes trainer.seed.", ge=0, le=LARGEST_64)
    filter_overlong_prompts: bool = opt(False, "Drop rows whose prompt is longer than max_prompt_length.")
    truncation: Literal["error", "left", "right", "middle"] = opt(
        "error", "What to do with a longer prompt: stop with an error, or cut that side."
    )
    apply_chat_template_kwargs: dict[str, Any] = opt(
        {}, "Variables of the chat template, e.g. {enable_thinking: false}, and add_generation_prompt (true)."
    )
