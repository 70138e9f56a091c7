"""Philox4x32-10 (Salmon, Moraes, Dror & Shaw, SC 2011), vectorised in numpy; the same stream as the Triton kernel."""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, np.ndarray], rounds: int = 10) -> np.ndarray:
    """Four 32-bit outputs per counter.

    Args:
        counter: four uint64 arrays of 32-bit values, broadcastable together.
        key: two uint64 arrays of 32-bit values, broadcastable with the counter.

    Returns:
        (..., 4) uint32.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def random_bits(seed: np.ndarray, position: np.ndarray, length: int) -> np.ndarray:
    """23 random bits per vocabulary entry: (B,) int64 seeds and positions -> (B, length) uint32."""
    key, place = seed.astype(np.uint64)[:, None], position.astype(np.uint64)[:, None]
    index = np.arange(-(-length // 4), dtype=np.uint64)[None, :]
    counter = (index, place & _LOW, place >> _SHIFT, np.zeros_like(place))
    words = philox4x32(counter, (key & _LOW, key >> _SHIFT)).reshape(len(seed), -1)[:, :length]
    return words >> np.uint32(9)
