"""The table of rotary angles, computed on the CPU once so that every device and engine reads the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vexact.models.config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """(num_positions, head_dim) fp32: cosines of the D/2 frequencies, then sines, times the factor of the scaling."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.table_factor


def frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) fp32, radians a position.

    ``llama3`` follows the Llama 3.1 reference, ``yarn`` arXiv 2309.00071: frequencies of long wavelengths are divided
    by ``factor``, those of short ones kept, the band between interpolated.
    """
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.type == "linear":
        return inv_freq / rope.factor
    if rope.type == "yarn":
        return _yarn(inv_freq, rope, head_dim)
    return _llama3(inv_freq, rope) if rope.type == "llama3" else inv_freq


def _llama3(inv_freq: Tensor, rope: RopeConfig) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq


def _yarn(inv_freq: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    low, high = (_dimension(rope, rotations, head_dim) for rotations in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 1e-3
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return interpolated * inv_freq / rope.factor + (1 - interpolated) * inv_freq


def _dimension(rope: RopeConfig, rotations: float, head_dim: int) -> float:
    """Which frequency, as a real number, turns so many times within the original context."""
    context = rope.original_max_position_embeddings
    return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
