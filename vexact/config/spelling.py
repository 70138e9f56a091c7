"""What a key or a value that is not known was meant to be."""

from __future__ import annotations

import difflib
from typing import Any

_TYPOGRAPHIC = {**dict.fromkeys("‐‑‒–—−", "-"), **dict.fromkeys("“”„", '"'), **dict.fromkeys("‘’", "'"), "\u00a0": " "}


def nearest(key: str, known: list[str], limit: int = 3) -> list[str]:
    """The known keys most like ``key``: the same last word in another place counts as near, the same place does not."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    similar = difflib.get_close_matches(key, _like(leaf, known, 0.6), n=limit, cutoff=0.8)
    leaf_names = sorted({name.rsplit(".", 1)[-1] for name in known})
    close_leaves = difflib.get_close_matches(leaf, leaf_names, n=limit, cutoff=0.75)
    by_leaf = [name for close in close_leaves for name in known if name.rsplit(".", 1)[-1] == close]
    by_leaf.sort(key=lambda name: -difflib.SequenceMatcher(None, key, name).ratio())
    return list(dict.fromkeys(same_leaf + similar + by_leaf))[:limit]


def misspelt(key: str, known: list[str], others: list[str]) -> str | None:
    """Which of ``others`` this is but for a slip of the pen; None if a known key is nearer, or none is near."""
    theirs = _like(key.rsplit(".", 1)[-1], others, 0.8)
    near = difflib.get_close_matches(key, [*known, *theirs], n=1, cutoff=0.9)
    return near[0] if near and near[0] in theirs else None


def _like(leaf: str, keys: list[str], cutoff: float) -> list[str]:
    """The keys whose last word is like ``leaf``."""
    return [key for key in keys if difflib.SequenceMatcher(None, leaf, key.rsplit(".", 1)[-1]).ratio() >= cutoff]


def typographic(value: Any) -> str:
    """A remark on the first character that a word processor puts for an ASCII one; empty for none.

    >>> typographic("–1")
    "; it holds '–' (U+2013) for '-'"
    """
    if not isinstance(value, str):
        return ""
    return next(
        (
            f"; it holds {char!r} (U+{ord(char):04X}) for {_TYPOGRAPHIC[char]!r}"
            for char in value
            if char in _TYPOGRAPHIC
        ),
        "",
    )
