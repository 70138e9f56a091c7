"""Triton kernels of the rotary operators."""
