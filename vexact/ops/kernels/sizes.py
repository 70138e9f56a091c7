"""Integer arithmetic of launches. Triton's own functions also work inside kernels, which costs microseconds a call."""

from __future__ import annotations


def cdiv(total: int, size: int) -> int:
    """Pieces of ``size`` that cover ``total``.

    >>> cdiv(7, 3)
    3
    """
    return -(-total // size)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` > 0.

    >>> next_power_of_2(5)
    8
    """
    return 1 << (n - 1).bit_length()
