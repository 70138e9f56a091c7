"""The one range of seeds: of the configuration, Python, the commands and HTTP requests."""

from __future__ import annotations

import operator
from typing import Any

from vexact.config.fields import LARGEST_64, describe_range


def check_seed(name: str, value: Any) -> int:
    """``value`` as an int.

    Raises:
        ValueError: it is no integer, or outside 0 … 2^63 - 1; ``name`` says whose it is.
    """
    try:
        seed = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r:.80} must be an integer") from None
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer, not a truth value")
    if not 0 <= seed <= LARGEST_64:
        raise ValueError(f"{name}={value!r:.80} must be {describe_range({'ge': 0, 'le': LARGEST_64})}")
    return seed
