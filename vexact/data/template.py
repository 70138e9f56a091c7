"""From a row to token ids: chat template, then the prompt-length limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vexact.data.rows import Row

Truncation = Literal["error", "left", "right", "middle"]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How prompts become token ids; the fields are verl's ``data.*`` keys."""

    max_prompt_length: int = 512
    truncation: Truncation = "error"
    filter_overlong_prompts: bool = False
    apply_chat_template: bool = True
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length={self.max_prompt_length} must be at least 1")
        if self.truncation not in get_args(Truncation):
            raise ValueError(
                f"data.truncation={self.truncation!r} is unknown; use one of {', '.join(get_args(Truncation))}"
            )


def tokenize(rows: Sequence[Row], tokenizer: Any, form: PromptFormat) -> list[list[int]]:
    """Token ids of every row, before any length limit.

    A string prompt becomes one user message when the tokenizer has a chat template and ``apply_chat_template`` is on;
    otherwise it is tokenised as it stands, with the special tokens the tokenizer itself adds.

    Raises:
        ValueError: a prompt is a list of messages, but there is no chat template or it is switched off.
    """
    chat = form.apply_chat_template and bool(tokenizer.chat_template)
    if not chat:
        for number, row in enumerate(rows):
            if not isinstance(row.prompt, str):
                raise _no_template(number, form.apply_chat_template)
        return [list(ids) for ids in tokenizer([row.prompt for row in rows])["input_ids"]]
    texts = [render(row, tokenizer, form) for row in rows]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def render(row: Row, tokenizer: Any, form: PromptFormat) -> str:
    """The prompt with the chat template applied, ready for the model's answer."""
    messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **form.apply_chat_template_kwargs
    )


def truncate(ids: list[int], limit: int, side: Truncation) -> list[int]:
    """``ids`` cut to ``limit`` tokens; ``left`` drops from the left, ``middle`` keeps both ends.

    >>> truncate([1, 2, 3, 4, 5], 3, "middle")
    [1, 4, 5]
    """
    assert side != "error"
    if len(ids) <= limit:
        return ids
    if side == "left":
        return ids[-limit:]
    if side == "right":
        return ids[:limit]
    head = limit // 2
    return ids[:head] + ids[head - limit :]


def _no_template(number: int, wanted: bool) -> ValueError:
    if not wanted:
        return ValueError(
            f"row {number}: the prompt is a list of messages, which data.apply_chat_template=false cannot format"
        )
    return ValueError(
        f"row {number}: the prompt is a list of messages, but the tokenizer has no chat template; "
        "set actor_rollout_ref.model.custom_chat_template, or give string prompts"
    )
