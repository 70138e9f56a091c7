"""CPU twin of latent_rope."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from vexact.ops.cpu.rotary import rope
from vexact.ops.rotary.latent_rope import rotated_and_joined


def forward(
    q: Tensor, k_plain: Tensor, k_rotated: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """(T, H, N + R), (T, H, N), (T, R) -> queries and keys (T, H, N + R), the last R rotated."""
    rotate = partial(rope.forward, inverse=False)
    return rotated_and_joined(rotate, q, k_plain, k_rotated, positions, cos_sin, interleaved)
