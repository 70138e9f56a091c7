"""Gumbel noise with the bits of the Triton kernel, so that a draw can be repeated on any device."""

from __future__ import annotations

from functools import cache

import numpy as np

from vexact.ops.cpu.sampling.portable_math import log_of_normal

RANDOM_BITS = 23
_TABLE_FROM = 4096  # entries per row from which looking noise up beats computing it
_CHUNK = 1 << 15
_ZERO = np.float32(0.0)


def gumbel(bits: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise -log(-log u) of u = (bits + 1/2) / 2^23: integers below 2^23 -> fp32, any shape."""
    return _table()[bits] if bits.shape[-1] >= _TABLE_FROM else _noise(bits)


def _noise(bits: np.ndarray) -> np.ndarray:
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-RANDOM_BITS)
    return _ZERO - log_of_normal(_ZERO - log_of_normal(u))  # a minus would give -0 where the kernel has +0


@cache
def _table() -> np.ndarray:
    """(2^23,) fp32, 32 MiB: the noise of every word."""
    parts = (np.arange(start, start + _CHUNK) for start in range(0, 1 << RANDOM_BITS, _CHUNK))
    return np.concatenate([_noise(part) for part in parts])
