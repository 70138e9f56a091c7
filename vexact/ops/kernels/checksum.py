"""Exact checksums of parts of many tensors in one launch, each element read once.

A program adds up the words of one stretch of one span; the stretches of a span are added in a second step. Integers do
not round, so neither the cut nor the order shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vexact.ops.kernels.tables import on_device

CONFIG = {"BLOCK": 4096, "num_warps": 8}
_STRETCH = 8 * CONFIG["BLOCK"]  # words per program
_WIDE = 16  # bytes of the widest load


@triton.jit
def _stretch_kernel(
    span_ptr,  # (M, 4) int64: address, words, position of the first, first program
    owner_ptr,  # (P,) int64: the span of a program
    out_ptr,  # (P,) int64
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    span = span_ptr + 4 * tl.load(owner_ptr + program)
    address, count = tl.load(span), tl.load(span + 1)
    position, first = tl.load(span + 2), tl.load(span + 3)
    if BITS == 8:
        words = address.to(tl.pointer_type(tl.int8))
    elif BITS == 16:
        words = address.to(tl.pointer_type(tl.int16))
    elif BITS == 32:
        words = address.to(tl.pointer_type(tl.int32))
    else:
        words = address.to(tl.pointer_type(tl.int64))
    if ALIGNED:
        words = tl.multiple_of(words, 16)
    start = (program - first) * STRETCH
    total = tl.zeros((BLOCK,), tl.int64)
    if start + STRETCH <= count:  # a mask, even one that hides nothing, would load word by word
        for block in tl.static_range(STRETCH // BLOCK):
            index = start + block * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(words + index).to(tl.int64) * (2 * (position + index) + 1)
    else:
        for block in tl.static_range(STRETCH // BLOCK):
            index = start + block * BLOCK + tl.arange(0, BLOCK)
            word = tl.load(words + index, mask=index < count, other=0).to(tl.int64)
            total += word * (2 * (position + index) + 1)
    tl.store(out_ptr + program, tl.sum(total))


def checksum_spans(words: Sequence[Tensor], spans: np.ndarray) -> Tensor:
    """Words (N,) of any integer type, spans (M, 4) int64 -> (M,) int64 on their device; see ``weights.fingerprint``.

    Nothing waits for the device. One launch serves all spans of one word size whose memory is equally aligned.
    """
    totals = torch.zeros(len(spans), dtype=torch.int64, device=words[0].device if words else None)
    if not len(spans):
        return totals
    sizes = np.array([tensor.element_size() for tensor in words], np.int64)[spans[:, 0]]
    addresses = np.array([tensor.data_ptr() for tensor in words], np.int64)[spans[:, 0]] + spans[:, 1] * sizes
    aligned = addresses % _WIDE == 0
    for size, is_aligned in sorted({*zip(sizes.tolist(), aligned.tolist())}):
        chosen = np.flatnonzero((sizes == size) & (aligned == is_aligned))
        table = np.stack([addresses[chosen], spans[chosen, 2] - spans[chosen, 1], spans[chosen, 3]], 1)
        _add(totals, table, chosen, size, is_aligned)
    return totals


def _add(totals: Tensor, table: np.ndarray, chosen: np.ndarray, size: int, aligned: bool) -> None:
    """Adds the checksums of the spans (address, words, position) in ``table`` to ``totals[chosen]``."""
    programs = -(-table[:, 1] // _STRETCH)
    num_programs = int(programs.sum())
    if not num_programs:
        return
    owners = np.repeat(np.arange(len(table)), programs)
    firsts = np.cumsum(programs) - programs
    spans = np.concatenate([table, firsts[:, None]], 1)
    packed = on_device(np.concatenate([spans.ravel(), owners, chosen[owners]]), totals.device)
    span_table, owner, target = packed.split([spans.size, num_programs, num_programs])
    partial = torch.empty(num_programs, dtype=torch.int64, device=totals.device)
    constants = {"BITS": 8 * size, "ALIGNED": aligned, "STRETCH": _STRETCH}
    _stretch_kernel[(num_programs,)](span_table, owner, partial, **constants, **CONFIG)
    totals.index_add_(0, target, partial)
