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


def column_blocks(width: int, widest: int = 2048, per_warp: int = 256) -> dict[str, int]:
    """Columns per program of a kernel whose columns are independent, and its warp count.

    >>> column_blocks(1000)
    {'BLOCK': 1024, 'num_warps': 4}
    """
    block = min(widest, next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // per_warp)}
