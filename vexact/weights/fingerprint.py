"""An exact fingerprint of a tensor's bits that costs one pass and no copy to the host.

sum_i bits_i * (2 i + 1) modulo 2^64 (signed), over the elements in row-major order. Integer addition is associative, so
the value is the same on every device, for every order, and adds up over the parts of a tensor, wherever they lie. Each
weight is odd, hence invertible modulo 2^64: a change of any single element always shows, and swapped elements do too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vexact.ops.dispatch import module

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor, offset: int = 0) -> int:
    """The checksum of one tensor, on the host. ``offset``: see ``checksums``."""
    return int(checksums([tensor], [offset]))


def checksums(tensors: Sequence[Tensor], offsets: Sequence[int] | None = None) -> Tensor:
    """The checksums of N tensors on one device: (N,) int64 there, without waiting for it.

    Args:
        offsets: where the first element of each lies in a larger tensor. The checksum of the larger one is the sum of
            its parts'. Default: 0.
    """
    spans = np.zeros((len(tensors), 4), np.int64)
    spans[:, 0] = range(len(tensors))
    spans[:, 2] = [tensor.numel() for tensor in tensors]
    if offsets is not None:
        spans[:, 3] = offsets
    return checksum_spans(tensors, spans)


def checksum_spans(tensors: Sequence[Tensor], spans: np.ndarray) -> Tensor:
    """The checksums of M parts of tensors on one device: (M,) int64 there, without waiting for it.

    Args:
        spans: (M, 4) int64, rows of (index of the tensor, begin, end, position): its elements [begin, end) in row-major
            order, the first of which counts as element ``position``.
    """
    words = [tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()]) for tensor in tensors]
    if not words:
        return torch.zeros(0, dtype=torch.int64)
    return module("checksum", words[0]).checksum_spans(words, spans)
