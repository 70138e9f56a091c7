"""Triton kernels of the mixture of experts. Counts are read on the device: nothing waits for the host."""
