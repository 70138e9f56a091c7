"""From a row to token ids: chat template, then the prompt-length limit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from vexact.data.chat_template import TRAINER, ChatTemplate, Fixes
from vexact.data.messages import Message, check_text, plain_messages
from vexact.data.rows import Row

log = logging.getLogger(__name__)
Truncation = Literal["error", "left", "right", "middle"]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How prompts become token ids; the fields are verl's ``data.*`` keys, but for ``fixes``, the words of messages."""

    max_prompt_length: int = 512
    truncation: Truncation = "error"
    filter_overlong_prompts: bool = False
    apply_chat_template: bool = True
    apply_chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixes: Fixes = TRAINER

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
    otherwise it is tokenised as it stands, with the special tokens that the tokenizer itself puts before it.

    Raises:
        ValueError: a prompt is a list of messages, but there is no chat template or it is switched off; a message
            that is no text; a template that refuses a prompt or leaves part of it out; a prompt without a token.
    """
    rows = [plain_row(row, number) for number, row in enumerate(rows)]
    if form.apply_chat_template and tokenizer.chat_template:
        chat = ChatTemplate(tokenizer, form.apply_chat_template_kwargs, fixes=form.fixes)
        texts = [chat.render(_messages(row), row.where) for row in rows]
        all_ids = [list(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    else:
        all_ids = _tokenize_as_is(rows, tokenizer, form)
    for row, ids in zip(rows, all_ids):
        if not ids:
            raise ValueError(f"{row.where}: the prompt {row.text!r:.80} tokenises to nothing")
    return all_ids


def warn_of_unknown_text(rows: Sequence[Row], all_ids: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Says which prompts hold characters that the tokenizer has no tokens for, which a model then never sees."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    token = getattr(getattr(backend, "model", None), "unk_token", None)
    if backend is None or token is None:
        return
    unknown = backend.token_to_id(token)
    found = [row for row, ids in zip(rows, all_ids, strict=True) if ids.count(unknown) > row.text.count(token)]
    if found:
        log.warning(
            "%d of %d prompts hold characters that the tokenizer does not know and reads as %r, the first of them "
            "%s: %.80r",
            len(found),
            len(rows),
            token,
            found[0].where,
            found[0].text,
        )


def warn_of_ended_prompts(rows: Sequence[Row], all_ids: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Says how many prompts end as a whole text does, white space aside: no model has learned to go on from there."""
    ended = [row for row, ids in zip(rows, all_ids, strict=True) if _is_ended(ids, tokenizer)]
    if ended:
        log.warning(
            "%d of %d prompts end with %r, the tokenizer's end of a text, the first of them %s: a response would begin "
            "behind it. A chat template should open it (add_generation_prompt of data.apply_chat_template_kwargs)",
            *(len(ended), len(rows), tokenizer.eos_token, ended[0].where),
        )


def _is_ended(ids: Sequence[int], tokenizer: Any) -> bool:
    if tokenizer.eos_token_id not in ids[-2:]:
        return False
    return bool(ids[-1] == tokenizer.eos_token_id) or tokenizer.decode(ids[-1:]).isspace()


def _tokenize_as_is(rows: Sequence[Row], tokenizer: Any, form: PromptFormat) -> list[list[int]]:
    for row in rows:
        if not isinstance(row.prompt, str):
            raise _no_template(row.where, form)
    all_ids = tokenizer([row.prompt for row in rows], verbose=False)["input_ids"]
    return [_open_ended(list(ids), row.text, tokenizer) for row, ids in zip(rows, all_ids)]


def render(row: Row, tokenizer: Any, form: PromptFormat) -> str:
    """The prompt with the chat template applied, ready for the model's answer. Raises ValueError as ``tokenize``."""
    row = plain_row(row, 0)
    return ChatTemplate(tokenizer, form.apply_chat_template_kwargs, fixes=form.fixes).render(_messages(row), row.where)


def plain_row(row: Row, number: int) -> Row:
    """The row with messages whose content is one string each, and with a name. Raises ValueError for other content."""
    where = row.where or f"row {number}"
    if isinstance(row.prompt, str):
        prompt: str | tuple[Message, ...] = check_text(row.prompt, where)
    else:
        prompt = plain_messages(row.prompt, where)
    return replace(row, prompt=prompt, where=where)


def _messages(row: Row) -> tuple[Message, ...]:
    return ({"role": "user", "content": row.prompt},) if isinstance(row.prompt, str) else row.prompt


def _open_ended(ids: list[int], text: str, tokenizer: Any) -> list[int]:
    """``ids`` without what a tokenizer made for whole documents adds: an end to be written past, or a second beginning
    where the text brings its own."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == eos and not text.rstrip().endswith(tokenizer.eos_token):
        ids = ids[:-1]
    if bos is not None and ids[:2] == [bos, bos] and not text.lstrip().startswith(2 * tokenizer.bos_token):
        ids = ids[1:]
    return ids


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


def _no_template(where: str, form: PromptFormat) -> ValueError:
    if not form.apply_chat_template:
        return ValueError(f"{where}: the prompt is a list of messages, which {form.fixes.switched_off} cannot format")
    return ValueError(
        f"{where}: the prompt is a list of messages, but the tokenizer has no chat template; {form.fixes.no_template}"
    )
