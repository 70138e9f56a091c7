"""Which parameters keep fp32 in a model of another dtype."""

from __future__ import annotations

import torch


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that parameter ``name`` (ours) has in a model of ``dtype``, when loaded, synced and saved.

    A router's correction bias stays fp32: rounded, it would choose other experts than it was trained to.
    """
    return torch.float32 if name.endswith(".router.bias") else dtype
