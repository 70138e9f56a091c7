"""Triton token embedding: a gather, and its gradient, which sums the rows of repeated tokens in order."""

from vexact.ops.kernels.embedding.gather import forward
from vexact.ops.kernels.embedding.grad import backward

__all__ = ["backward", "forward"]
