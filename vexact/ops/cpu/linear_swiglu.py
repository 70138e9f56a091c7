"""SwiGLU of a product with fused projections on the CPU: the two operators."""

from __future__ import annotations

from torch import Tensor

from vexact.ops.cpu import linear, swiglu


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (2I, K) -> (M, I)."""
    return swiglu.forward(linear.forward(x, weight, None, x.dtype))
