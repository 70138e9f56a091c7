"""Triton linear cross-entropy: forward, backward, and both at once, without a T x V matrix."""

from vexact.ops.kernels.linear_cross_entropy.single_pass import one_pass
from vexact.ops.kernels.linear_cross_entropy.two_pass import backward, forward

__all__ = ["backward", "forward", "one_pass"]
