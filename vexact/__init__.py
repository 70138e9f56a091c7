"""Exact reinforcement learning for language models: what is sampled is what is trained, bit for bit.

Importing this package does no work: no other module, no environment, no device is touched.
"""

__version__ = "0.1.0"
