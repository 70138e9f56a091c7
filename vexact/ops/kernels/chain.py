"""How the kernels of a decode step follow each other.

A decode step is some 250 kernels of a few microseconds. Each may be launched while the one before it ends (programmatic
dependent launch): its programs come to the multiprocessors as those of its predecessor leave them, and wait there for
the rest. Three rules make that safe, and every kernel that takes ``CHAINED`` keeps them:

1. Every program waits, with work or without, before it reads or writes anything. A grid whose programs left without
   waiting could end before its predecessor, and whoever waits for that grid would read too early.
2. A kernel starts when every program of its predecessor has let it, so all of these are on multiprocessors already:
   nobody waits for a place that a waiting program holds. Products and attention let it after their own wait, kernels of
   rows perhaps before (``early``). So at most two predecessors have not ended, and few programs wait at a time.
3. Before it waits, a program may ask for memory that it will read, its weights: a request to the second-level cache
   gives the program no value, so none can be out of date.

What follows a kernel that keeps no rules (one of torch's) starts when that has ended. Nothing here changes a bit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LARGE = sys.maxsize  # a bound no step exceeds
_UNIT = 16  # bytes: what requests are multiples of


@dataclass(frozen=True, slots=True)
class Chain:
    """How the kernels of a step of some number of rows are launched: a choice of speed only."""

    overlap: bool = False  # each while the one before it ends
    early: bool = False  # kernels of rows let the next one start before they wait themselves; with overlap only
    ask: int = 0  # KiB of its weight that a program of a product asks for before it waits; read with overlap only
    ahead: int = 0  # MiB of the weight that is read next that a product asks for, too; with overlap only
    fuse: bool = False  # SwiGLU in the product of gate and up, where no gradient is wanted


# (most rows, how): the first entry whose bound holds the rows. Everything is off, because nothing of it has been timed
# on a GPU; ``benchmarks/decode/kernels.py`` measures each part alone and all together, and prints this table.
STEPS: tuple[tuple[int, Chain], ...] = ((LARGE, Chain()),)


def of(rows: int) -> Chain:
    """The chain that the kernels of a step of ``rows`` tokens form."""
    return next(chain for bound, chain in STEPS if rows <= bound)


def options(rows: int, possible: bool, *, may_be_early: bool = False) -> dict[str, int | bool]:
    """Constants and launch options of a kernel of a step: how it is ``CHAINED``, 0 (not), 1 or 2 (``early``).

    possible: whether the device can overlap kernels. may_be_early: for kernels of rows.

    A kernel that is not chained has no launch option either: compilers for other GPUs refuse one that they do not know.
    """
    chain = of(rows)
    if not (possible and chain.overlap):
        return {"CHAINED": 0}
    return {"CHAINED": 2 if chain.early and may_be_early else 1, "launch_pdl": True}


def pieces(asked: int, rows: int, row_bytes: int, warps: int) -> tuple[int, int]:
    """(pieces of a row, bytes of each) for a program that asks for about ``asked`` bytes of ``rows`` rows: at least one
    request a thread, so that no two threads make the same one.

    >>> pieces(64 << 10, 32, 4096, 4), pieces(64 << 10, 32, 1024, 4), pieces(0, 32, 4096, 4)
    ((4, 512), (4, 256), (4, 0))
    """
    count = max(1, 32 * warps // rows)
    size = min(row_bytes, asked // rows) // count
    return count, size - size % _UNIT


def shares(asked: int, available: int, programs: int, threads: int) -> int:
    """Bytes for each thread of some programs that together ask for about ``asked`` of ``available`` bytes.

    >>> shares(1 << 20, 1 << 30, 64, 128), shares(1 << 20, 100_000, 64, 128)
    (128, 0)
    """
    size = min(asked, available) // (programs * threads)
    return size - size % _UNIT


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Wait for the kernel before this one and let the next one start; if CHAINED is 2, the other way round."""
    if CHAINED == 2:
        gdc_launch_dependents()
    if CHAINED:
        gdc_wait()
    if CHAINED == 1:
        gdc_launch_dependents()


@triton.jit
def request(address, size):
    """Ask the second-level cache for ``size`` (int32) bytes, a multiple of 16, from ``address`` (int64) on."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.s32 wanted, $2, 0;
        @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_for_rows(ptr, first, num_rows, stride, piece, ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Ask for the first PIECES * ``piece`` bytes of the rows ``first`` to ``first`` + ROWS - 1, of which there are
    ``num_rows``, ``stride`` elements apart."""
    rows = first + tl.arange(0, ROWS)[:, None]
    parts = tl.arange(0, PIECES)[None, :]
    address = (ptr + rows.to(tl.int64) * stride).to(tl.int64) + parts * piece
    request(address, tl.where(rows < num_rows, piece, 0) + tl.zeros_like(parts))


@triton.jit
def ask_for_share(ptr, share, THREADS: tl.constexpr):
    """Ask for this program's part of what lies from ``ptr`` on: ``share`` bytes for each of its threads."""
    stride = share // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    first = tl.program_id(0) * THREADS
    ask_for_rows(ptr, first, first + THREADS, stride, share, THREADS, 1)
