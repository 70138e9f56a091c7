"""The table of rotary angles, computed on the CPU once so that every device and engine reads the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vexact.models.config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """(num_positions, head_dim) fp32: cosines of the D/2 frequencies, then sines."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) fp32, radians a position.

    ``llama3`` scaling follows the Llama 3.1 reference: long wavelengths are divided by ``factor``, short ones kept, the
    band between interpolated.
    """
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.type == "linear":
        return inv_freq / rope.factor
    return _llama3(inv_freq, rope) if rope.type == "llama3" else inv_freq


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
