"""Triton linear layer: C = A Bᵀ with sequential K, the forward and both gradients."""

from vexact.ops.kernels.linear.launch import forward, grad_bias, grad_input, grad_weight, matmul

__all__ = ["forward", "grad_bias", "grad_input", "grad_weight", "matmul"]
