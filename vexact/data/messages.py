"""The messages of a chat prompt, made plain: a role and one text each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]


def plain_messages(messages: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Messages whose ``content`` is one string: a list of text parts is joined, as chat templates that know parts do.

    Keys that are null are left out, and so are ``tool_calls`` without a call, since a parquet file gives every message
    the keys of all.

    Args:
        messages: a non-empty list of ``{"role", "content"}`` mappings.
        where: file, row and column, for messages.

    Raises:
        ValueError: no messages; no role or content; a part that is no text (an image, say); a content of another type;
            tool calls; text that UTF-8 cannot hold, in the content or anywhere else.
    """
    if not messages:
        raise ValueError(f"{where} holds no messages; give at least {{'role': 'user', 'content': …}}")
    return tuple(_plain(message, f"{where}, message {number}") for number, message in enumerate(messages))


def check_text(text: str, where: str) -> str:
    """``text``. Raises ValueError if it holds a lone surrogate, which no tokenizer encodes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(
            f"{where} holds the lone surrogate {bad!r} at character {error.start}, which is no text; mend it"
        ) from None
    return text


def _plain(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} must be a mapping with 'role' and 'content', it is {message!r:.80}")
    kept = {str(key): value for key, value in message.items() if value is not None and (key != "tool_calls" or value)}
    role = kept.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}: role={role!r} must be a name such as 'user'; keys there: {', '.join(kept)}")
    if "tool_calls" in kept:
        raise ValueError(f"{where} (role {role!r}) holds tool_calls, which are not supported; write them as content")
    kept["content"] = _text(kept.get("content"), f"{where} (role {role!r})")
    for text in texts(kept):
        check_text(text, where)
    return kept


def texts(value: Any) -> Iterator[str]:
    """All strings of a message, or of anything that JSON can hold: a chat template may show any of them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple) and content:
        return "".join(_part(part, f"{where}, part {number}") for number, part in enumerate(content))
    what = "is missing or null" if content is None else f"is {type(content).__name__} {content!r:.80}"
    raise ValueError(f"{where}: content must be a string or a list of text parts, it {what}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", None) and isinstance(part.get("text"), str):
        return str(part["text"])
    what = f"is of type {kind!r}" if kind not in ("text", None) else f"is {part!r:.80}"
    raise ValueError(f"{where} {what}; only parts {{'type': 'text', 'text': …}} are supported")
