"""CPU twin of the checksums of parts of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 15
"""Words widened to 64 bits at a time: they and their weights stay in the cache, and PyTorch starts no threads for them,
which on a busy machine would wait for each other longer than this takes."""


def checksum_spans(words: Sequence[Tensor], spans: np.ndarray) -> Tensor:
    """Words (N,) of any integer type, spans (M, 4) int64 -> (M,) int64; see ``weights.fingerprint``.

    The word at place j of a chunk that starts at position p has the weight 2 j + (2 p + 1).
    """
    weights = torch.arange(0, 2 * CHUNK, 2)
    totals = torch.zeros(len(spans), dtype=torch.int64)
    for index, (tensor, begin, end, position) in enumerate(spans.tolist()):
        for start in range(begin, end, CHUNK):
            chunk = words[tensor][start : min(end, start + CHUNK)].long()
            plain = chunk.sum()
            totals[index] += torch.dot(chunk, weights[: chunk.numel()]) + plain * (position + start - begin) * 2 + plain
    return totals
