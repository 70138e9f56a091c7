"""The chat template: read from text or file, probed before use, and never trusted to show what it was given."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vexact.data.messages import Message, check_text, texts

log = logging.getLogger(__name__)

KEY = "actor_rollout_ref.model.custom_chat_template"
KWARGS_KEY = "data.apply_chat_template_kwargs"
_CONTENT = "{{ messages[0]['content'] }}"
_THOUGHT_END = "</think>"  # templates leave out what an earlier answer thought


@dataclass(frozen=True, slots=True)
class Fixes:
    """What whoever gave a prompt can change, in the words of messages: those of the trainer's configuration."""

    kwargs: str = KWARGS_KEY  # what the template's variables are called
    refused: str = f"change the rows, or set {KEY} to a template for them"
    formatted: str = f'take it out of the row. If prompts are formatted already, set {KEY}="{_CONTENT}"'
    no_template: str = f"set {KEY}, or give string prompts"
    switched_off: str = "data.apply_chat_template=false"


TRAINER = Fixes()


def read_template(value: str) -> str:
    """The Jinja text that ``custom_chat_template`` stands for: itself, or the file it names.

    Raises:
        ValueError: it is neither Jinja nor a readable file.
    """
    if "{{" in value or "{%" in value:
        return value
    path = Path(os.path.expanduser(value))
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{KEY}={value!r} is not a readable text file: {error}") from error
    raise ValueError(
        f"{KEY}={value!r:.120} is neither a Jinja template (with {{{{ … }}}} or {{% … %}}) nor a file (looked in "
        f"{Path.cwd()}); leave it null for the tokenizer's own"
    )


def check_kwargs(kwargs: Mapping[str, Any], tokenizer: Any, name: str = KWARGS_KEY) -> dict[str, Any]:
    """The arguments of every rendering; ``add_generation_prompt`` is True unless they say otherwise.

    Args:
        name: what they are called where they were given.

    Raises:
        ValueError: an argument that is not the template's but decides what becomes of its text, or is the chat itself.
    """
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"add_generation_prompt", "kwargs"}
    for key in kwargs:
        if not isinstance(key, str) or key in own or key in ("self", "messages"):
            raise ValueError(
                f"{name}: {key!r:.80} cannot be set; prompts are rendered as text from the messages, and the "
                "keys given here are variables of the chat template, such as enable_thinking, or add_generation_prompt"
            )
    prompted = kwargs.get("add_generation_prompt", True)
    if not isinstance(prompted, bool):
        raise ValueError(f"{name}: add_generation_prompt={prompted!r:.80} must be true or false")
    return {"add_generation_prompt": True, **kwargs}


def unknown_variables(kwargs: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Arguments that the chat template never reads, so that they change nothing."""
    text = _source(tokenizer)
    keys = kwargs.keys() - {"add_generation_prompt"}
    return sorted(key for key in keys if not re.search(rf"\b{re.escape(key)}\b", text))


def _source(tokenizer: Any) -> str:
    source = tokenizer.chat_template
    return source if isinstance(source, str) else "".join(source.values())


class ChatTemplate:
    """Renders chats with a tokenizer's template and sees that every message is in the text."""

    def __init__(
        self,
        tokenizer: Any,
        kwargs: Mapping[str, Any],
        origin: str = "the tokenizer's chat template",
        fixes: Fixes = TRAINER,
    ) -> None:
        """Raises ValueError as ``check_kwargs``. ``origin`` names the template in messages."""
        self._tokenizer = tokenizer
        self._kwargs = check_kwargs(kwargs, tokenizer, fixes.kwargs)
        self._origin, self._fixes = origin, fixes
        added = tokenizer.added_tokens_decoder.values()
        self._specials = {token.content for token in added if token.special}
        self._marks: dict[tuple[str, ...], set[str]] = {}  # roles of a chat -> special tokens that shape it

    def check(self) -> None:
        """Look at the template before any row is read; warns of arguments it does not know, and of a date in prompts.

        Raises:
            ValueError: it is no valid Jinja, or leaves out what a user says.
        """
        self._shape(("user",), self._origin)
        for key in unknown_variables(self._kwargs, self._tokenizer):
            log.warning("%s: %s has no variable %r; it changes nothing", self._fixes.kwargs, self._origin, key)
        if self._changes_with_time():
            log.warning(
                "%s puts today's date into prompts: the same run has others on another day, and will not go on from a "
                "checkpoint; give a date, if the template takes one, such as %s={date_string: '26 Jul 2024'}",
                self._origin,
                self._fixes.kwargs,
            )

    def render(self, messages: Sequence[Message], where: str) -> str:
        """The prompt's text.

        Args:
            messages: as ``plain_messages`` gives them.
            where: file and row, for messages.

        Raises:
            ValueError: the template refuses the chat or leaves a message out, or a message holds one of the special
                tokens that separate messages, in its content or anywhere else.
        """
        text = self._apply(messages, where)
        marks = self._shape(tuple(message["role"] for message in messages), where)
        for number, message in enumerate(messages):
            said = message["content"]
            shown = said.rpartition(_THOUGHT_END)[2] if message["role"] == "assistant" else said
            if shown.strip() not in text:
                raise self._left_out(where, number, message, text)
            imitated = sorted(mark for mark in marks if any(mark in held for held in texts(message)))
            if imitated:
                raise ValueError(
                    f"{where}: message {number} (role {message['role']!r}) holds {imitated[0]!r}, a special token with "
                    f"which the chat template separates messages; {self._fixes.formatted}"
                )
        return text

    def _changes_with_time(self) -> bool:
        """Whether a prompt depends on when it is rendered."""
        if "strftime_now" not in _source(self._tokenizer):
            return False
        message = [{"role": "user", "content": "x"}]
        render = partial(self._tokenizer.apply_chat_template, message, tokenize=False, **self._kwargs)
        clock = "{{% macro strftime_now(form) %}}{}{{% endmacro %}}"  # as an argument it would be made a text
        try:
            source = self._tokenizer.get_chat_template()
            return render(chat_template=clock.format(1) + source) != render(chat_template=clock.format(2) + source)
        except Exception:  # of a template; its real rendering says what is wrong
            return True

    def _shape(self, roles: tuple[str, ...], where: str) -> set[str]:
        """The special tokens that a text must not hold inside a chat of these roles; checks the roles with a stand-in
        for each message."""
        if roles not in self._marks:
            stand_ins = [{"role": role, "content": f"VexactMessage{i}End"} for i, role in enumerate(roles)]
            try:
                text = self._apply(stand_ins, where)
            except TemplateRefusal:  # it may want a certain content; then the rows alone can tell
                self._marks[roles] = set()
                return set()
            for number, message in enumerate(stand_ins):
                if message["content"] not in text:
                    raise self._left_out(where, number, message, text)
            self._marks[roles] = self._marks_in(text, "".join(message["content"] for message in stand_ins))
        return self._marks[roles]

    def _marks_in(self, text: str, contents: str) -> set[str]:
        if text == contents:  # it adds nothing: the rows bring their own format
            return set()
        ends = {self._tokenizer.bos_token, self._tokenizer.eos_token}
        return {token for token in self._specials if token in text or token in ends}

    def _apply(self, messages: Sequence[Message], where: str) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **self._kwargs)
        except TemplateSyntaxError as error:
            raise ValueError(f"{self._origin} is not a valid Jinja template: line {error.lineno}: {error}") from error
        except Exception as error:  # a template is foreign code and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            fix = self._fixes.refused
            raise TemplateRefusal(f"{where}: the chat template refuses messages of {roles}: {error}; {fix}") from error
        return check_text(str(text), f"{where}, as the chat template shows it,")

    def _left_out(self, where: str, number: int, message: Message, text: str) -> ValueError:
        return ValueError(
            f"{where}: {self._origin} leaves out message {number} (role {message['role']!r}): "
            f"{message['content']!r:.60} becomes {text!r:.80}; {self._fixes.refused}"
        )


class TemplateRefusal(ValueError):
    """The template raised an error for a chat."""
