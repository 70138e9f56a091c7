"""Text of foreign origin, made safe to show and to store."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """``text`` with everything a terminal might obey written as an escape.

    Control characters, escape sequences, direction overrides, other invisible characters and lone surrogates become
    ``\\x1b``, ``\\u202e`` or ``\\udc80``; characters in ``keep`` (line feeds, for instance) stay.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode("ascii") for each in text
    )
