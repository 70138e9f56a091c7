"""How the kernels of a decode step follow each other.

A decode step is some 250 kernels of a few microseconds. Each may be launched while the one before it ends (programmatic
dependent launch): its programs come to the multiprocessors as those of its predecessor leave them, and wait there for
the rest. Two rules make that safe, and every kernel that takes ``CHAINED`` keeps them:

1. Every program waits, with work or without, before it reads or writes anything. A grid whose programs left without
   waiting could end before its predecessor, and whoever waits for that grid would read too early.
2. A kernel starts when every program of its predecessor has let it, so all of these are on multiprocessors already:
   nobody waits for a place that a waiting program holds. Products and attention let it after their own wait, kernels of
   rows perhaps before (``early``). So at most two predecessors have not ended, and few programs wait at a time.

What follows a kernel that keeps no rules (one of torch's) starts when that has ended, and so does such a kernel that
follows one that keeps them. Which step a kernel belongs to is a matter of its rows alone, so short prompts and the
forward of training are chained, too, and safe for the same reasons. Nothing here changes a bit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LARGE = sys.maxsize  # a bound no step exceeds


@dataclass(frozen=True, slots=True)
class Chain:
    """How the kernels of a step of some number of rows are launched: a choice of speed only."""

    overlap: bool = False  # each while the one before it ends
    early: bool = False  # kernels of rows let the next one start before they wait themselves; with overlap only
    fuse: bool = False  # SwiGLU in the product of gate and up, where no gradient is wanted


# (most rows, how): the first entry whose bound holds the rows. ``benchmarks/decode/kernels.py`` measured 1, 8, 64 and
# 256 rows on an H100 (``results/decode_kernels_h100.json``): 64 gain 4 %, 256 nothing. 128 lies between them and was
# not measured.
STEPS: tuple[tuple[int, Chain], ...] = (
    (1, Chain(overlap=True, early=True)),
    (128, Chain(overlap=True)),
    (LARGE, Chain()),
)


def of(rows: int) -> Chain:
    """The chain that the kernels of a step of ``rows`` tokens form."""
    return next(chain for bound, chain in STEPS if rows <= bound)


def overlapping(possible: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start while the one before it ends, and so waits for that by itself: none
    where this is not possible, because compilers for other GPUs refuse an option that they do not know."""
    return {"launch_pdl": True} if possible else {}


def options(rows: int, possible: bool, *, may_be_early: bool = False) -> dict[str, int | bool]:
    """Constants and launch options of a kernel of a step: how it is ``CHAINED``, 0 (not), 1 or 2 (``early``).

    possible: whether the device can overlap kernels. may_be_early: for kernels of rows.
    """
    chain = of(rows)
    chained = possible and chain.overlap
    return {"CHAINED": (2 if chain.early and may_be_early else 1) if chained else 0, **overlapping(chained)}


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait for the kernel before this one and let the next one start; if CHAINED is 2, the other way round."""
    if CHAINED == 2:
        gdc_launch_dependents()
    if CHAINED:
        gdc_wait()
    if CHAINED == 1:
        gdc_launch_dependents()
