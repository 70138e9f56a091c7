"""Triton sampling: the kept set of a row, a token of it by Gumbel noise, and its log-probability."""

from vexact.ops.kernels.sampling.draw import sample

__all__ = ["sample"]
