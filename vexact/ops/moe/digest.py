"""A 64-bit hash of the experts that a layer chose for a token, from operations that every device has."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 64
LAYER = 0x9E3779B97F4A7C15  # odd, as the next three
EXPERT = 0xD1B54A32D192ED03 - _WORD
MULTIPLIERS = (0xFF51AFD7ED558CCD - _WORD, 0xC4CEB9FE1A85EC53 - _WORD)
SHIFT = 33


def start_of(salt: int) -> int:
    """The state before the first expert, as a signed 64-bit number.

    >>> start_of(0) != start_of(1)
    True
    """
    word = (salt + 1) * LAYER % _WORD
    return word - _WORD if word >= _WORD // 2 else word


def digest_of(experts: Tensor, salt: int) -> Tensor:
    """(T, k) integers, ascending -> (T,) int64; wrap-around arithmetic.

    Per expert, h becomes mix(h + (e + 1) * EXPERT), where mix is the finaliser of MurmurHash3: x ^= x >>> 33 before,
    between and after two multiplications (>>> fills with zeros). Every step is a bijection of h. Equal sets of a layer
    have equal digests; any two others are alike with a chance of 2^-64.
    """
    state = torch.full(experts.shape[:1], start_of(salt), dtype=torch.int64, device=experts.device)
    for expert in experts.long().unbind(1):
        state = _mix(state + (expert + 1) * EXPERT)
    return state


def _mix(x: Tensor) -> Tensor:
    for multiplier in MULTIPLIERS:
        x = (x ^ _shifted(x)) * multiplier
    return x ^ _shifted(x)


def _shifted(x: Tensor) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (x >> SHIFT) & ((1 << (64 - SHIFT)) - 1)
