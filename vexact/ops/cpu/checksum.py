"""Exact checksums of parts of tensors in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements widened to 64 bits at a time, so that the scratch memory stays at tens of megabytes."""


def checksum_spans(words: Sequence[Tensor], spans: np.ndarray) -> Tensor:
    """Words (N,) of any integer type, spans (M, 4) int64 -> (M,) int64 on their device; see ``weights.fingerprint``."""
    device = words[0].device if words else None
    totals = torch.zeros(len(spans), dtype=torch.int64, device=device)
    for index, (tensor, begin, end, position) in enumerate(spans.tolist()):
        for start in range(begin, end, CHUNK):
            chunk = words[tensor][start : min(end, start + CHUNK)].long()
            first = position + start - begin
            weights = torch.arange(first, first + chunk.numel(), device=device).mul_(2).add_(1)
            totals[index] += (chunk * weights).sum()
    return totals
